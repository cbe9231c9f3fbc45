"""A byte-level BPE tokenizer trained from text, by the `tokenizers` library."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hybridlm import untrusted
from hybridlm.data import tokenizer
from hybridlm.errors import ConfigError

SEPARATOR = tokenizer.SEPARATORS[0]
SMALLEST = 257  # the bytes and the separator
MAX_BYTES = 1 << 30  # of text that merges are counted on


def train(texts: Iterable[bytes], vocab_size: int, path: Path) -> None:
    """Writes a tokenizer.json of ``vocab_size`` ids: the bytes, merges of them, and a separator.

    The first MAX_BYTES of ``texts`` are counted. Words are cut as GPT-2's are, so every text is read back as
    it was. A text too small for so many merges gives fewer ids: ConfigError.
    """
    if not SMALLEST < vocab_size <= tokenizer.MAX_ID:
        allowed = f"must be more than {SMALLEST} (bytes and separator) and at most {tokenizer.MAX_ID:,}"
        raise ConfigError("--train_bpe", vocab_size, allowed)
    file = tokenizers.Tokenizer(models.BPE())
    file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    file.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    file.train_from_iterator(_lines(texts), trainer)
    if (found := file.get_vocab_size()) < vocab_size:
        allowed = f"is more than the {found:,} ids that this text gives"
        raise ConfigError("--train_bpe", vocab_size, allowed, "Ask for fewer, or add text.")
    untrusted.write_text(path, file.to_str(pretty=True))


def _lines(texts: Iterable[bytes]) -> Iterator[str]:
    """Pieces that the library counts apart."""
    left = MAX_BYTES
    for text in texts:
        yield from text[:left].decode(errors="replace").splitlines(keepends=True)
        left -= len(text)
        if left <= 0:
            return
