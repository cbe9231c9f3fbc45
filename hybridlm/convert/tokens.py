"""The tokenizer of an exported folder: files that transformers reads, and the ids that its configs name."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import tokenizers as library

from hybridlm import untrusted, weights
from hybridlm.config import Config
from hybridlm.convert.families import CONFIG
from hybridlm.data import tokenizer as tokenizers
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError
from hybridlm.init_from import CARRIED
from hybridlm.weights import TOKENIZER

log = logging.getLogger("hybridlm")

SEPARATOR = "<doc>"  # where a tokenizer has none of its own
OTHERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
          "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json")  # fmt: skip
IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def of(workdir: Path, config: Config) -> Tokenizer | None:
    """The run's tokenizer; a warning where it cannot be read any more."""
    try:
        return weights.tokenizer(workdir, config)
    except ConfigError as error:
        log.warning("exported without a tokenizer: %s", error)
        return None


def foreign(file: Path, own: Tokenizer | None, config: Config) -> bool:
    """Whether a file that an import brought is of another tokenizer than the run's ``own``.

    Without one it is the model's as long as that is what was imported, and nothing was trained from it.
    """
    if file.name not in (TOKENIZER, *OTHERS):
        return False
    if own is None:
        return bool(config.init_from)
    theirs = file.with_name(TOKENIZER)
    return not theirs.is_file() or hashlib.sha256(theirs.read_bytes()).hexdigest() != own.fingerprint


def special(workdir: Path, own: Tokenizer | None) -> dict[str, int | None]:
    """bos, eos and pad of config.json: the separator of documents of the run's tokenizer, which stands before
    and after each; without one those of the import, or null: a family's defaults may not exist here."""
    if own is not None:
        return {"pad_token_id": None, "bos_token_id": own.doc_id, "eos_token_id": own.doc_id}
    file = workdir / CARRIED / CONFIG
    imported = untrusted.read_json(file, "--workdir", dict) if file.is_file() else {}
    return {name: imported.get(name) for name in IDS}


def write(folder: Path, own: Tokenizer | None, config: Config) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json, unless the import brought them."""
    if own is None:
        return
    if (folder / TOKENIZER).exists():  # the import's, which is the run's
        return
    file = (
        byte_level()
        if own.name == "bytes"
        else library.Tokenizer.from_buffer(untrusted.read_bytes(own.name, "tokenizer"))
    )
    named = file.id_to_token(own.doc_id)
    if named is None:
        file.add_special_tokens([SEPARATOR])
        named = SEPARATOR
    if file.token_to_id(named) != own.doc_id:
        log.warning("the separator of documents, id %d, has no place in tokenizer.json", own.doc_id)
        named = None
    untrusted.write_text(folder / TOKENIZER, file.to_str(pretty=True))
    tokens = {} if named is None else {"bos_token": named, "eos_token": named}
    described: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    untrusted.write_json(
        folder / "tokenizer_config.json", described | tokens | {"model_max_length": config.train.seq_len}
    )
    ends = list(own.ends) if own.more_ends else own.doc_id  # a student ends its texts as its teacher did
    ids = {"bos_token_id": own.doc_id, "eos_token_id": ends}
    untrusted.write_json(folder / "generation_config.json", ids)


def byte_level() -> library.Tokenizer:
    """The bytes tokenizer as a file: 256 bytes under their own ids, no merges, then the separator."""
    vocabulary = tokenizers._byte_of_character()
    file = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=[]))
    file.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    file.decoder = library.decoders.ByteLevel()
    file.add_special_tokens([SEPARATOR])
    return file
