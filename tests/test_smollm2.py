"""A GGUF file of a Llama as a folder: logits against llama.cpp's conventions in NumPy, tokens, the text."""

import numpy as np
import pytest

from benchmarks import smollm2
from hybridlm.convert import evaluate, incoming
from hybridlm.data import tokenizer as tokenizers
from hybridlm.errors import ConfigError

LAYERS, WIDTH, HEADS, GROUPS, HIDDEN, THETA = 2, 48, 6, 2, 80, 100.0
DIM = WIDTH // HEADS
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the", "1 2"]


def described() -> dict:
    """What a GGUF file says: llama.cpp's names, three special tokens, the bytes, the merges."""
    tokens = [*SPECIAL, *tokenizers._byte_of_character(), *(merge.replace(" ", "") for merge in MERGES)]
    sizes = {
        "block_count": LAYERS, "embedding_length": WIDTH, "feed_forward_length": HIDDEN, "context_length": 64,
        "attention.head_count": HEADS, "attention.head_count_kv": GROUPS, "rope.freq_base": THETA,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    }  # fmt: skip
    return {"general.architecture": "llama", **{f"llama.{name}": value for name, value in sizes.items()}} | {
        "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    matrix = lambda rows, columns: rng.normal(size=(rows, columns)).astype(np.float32) / columns**0.5
    scale = lambda: (1 + 0.2 * rng.normal(size=WIDTH)).astype(np.float32)
    kv = GROUPS * DIM
    shapes = {
        "attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH), "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN),
    }  # fmt: skip
    made = {"token_embd.weight": matrix(len(described()["tokenizer.ggml.tokens"]), WIDTH)}
    for i in range(LAYERS):
        made |= {f"blk.{i}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        made |= {f"blk.{i}.{name}_norm.weight": scale() for name in ("attn", "ffn")}
    return made | {"output_norm.weight": scale()}


def file(tensors: dict[str, np.ndarray], **fields) -> smollm2.File:
    shapes = {name: array.shape for name, array in tensors.items()}
    return smollm2.File(described() | fields, shapes, tensors.__getitem__)


def llama(w: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of a GGUF file's tensors as llama.cpp runs them: channels 2i and 2i + 1 turn together."""
    w = {name.removesuffix(".weight"): array.astype(np.float64) for name, array in w.items()}
    norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    angle = np.arange(len(ids))[:, None, None] * THETA ** -(np.arange(0, DIM, 2) / DIM)

    def turned(x: np.ndarray) -> np.ndarray:
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    x = w["token_embd"][ids]
    for i in range(LAYERS):
        part = lambda name, layer=i: w[f"blk.{layer}.{name}"]
        h = norm(x, part("attn_norm"))
        q, k, v = ((h @ part(f"attn_{one}").T).reshape(len(ids), -1, DIM) for one in "qkv")
        q, k = turned(q), turned(k).repeat(HEADS // GROUPS, 1)
        scores = np.where(np.tri(len(ids)), np.einsum("thd,shd->hts", q, k) / DIM**0.5, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        o = np.einsum("hts,shd->thd", shares, v.repeat(HEADS // GROUPS, 1))
        x = x + o.reshape(len(ids), WIDTH) @ part("attn_output").T
        h = norm(x, part("ffn_norm"))
        gate = h @ part("ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ part("ffn_up").T)) @ part("ffn_down").T
    return norm(x, w["output_norm"]) @ w["token_embd"].T


@pytest.mark.once
def test_the_folder_computes_what_llama_cpp_does(tmp_path):
    tensors = weights()
    smollm2.write_folder(file(tensors), tmp_path / "hf")
    config = incoming.import_hf(tmp_path / "hf", tmp_path / "run")
    definition, params = evaluate.load(tmp_path / "run")
    ids = np.random.default_rng(1).integers(0, config.model.vocab_size, 17)
    got = evaluate.logits(definition, params, ids[None])[0]
    want = llama(tensors, ids)
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    read = tokenizers.load(str(tmp_path / "run" / "tokenizer.json"))
    assert read.doc_id == 0 and read.vocab_size == config.model.vocab_size
    tokens = read.encode("the theé 12<|im_end|>")
    named = [read.file.id_to_token(i) for i in tokens[:6]]
    assert named == ["the", "Ġthe", "Ã", "©", "Ġ", "1"], "digits stand alone, merged or not"
    assert min(tokens) >= len(SPECIAL) and read.decode(tokens) == "the theé 12<|im_end|>"


@pytest.mark.once
def test_a_file_is_read_and_dequantised(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    path, said, eighths = tmp_path / "x.gguf", described(), gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, said.pop("general.architecture"))
    add = {str: "string", float: "float32", int: "uint32", list: "array"}
    for name, value in said.items():
        getattr(writer, f"add_{add[type(value)]}")(name, value)
    tensors = {"token_embd.weight": np.arange(-128, 128, dtype=np.float32).reshape(4, 64)}
    tensors["output_norm.weight"] = tensors["token_embd.weight"][0]
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.add_tensor(
        "blk.0.attn_q.weight", gguf.quants.quantize(tensors["token_embd.weight"], eighths), raw_dtype=eighths
    )
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    read = smollm2.opened(str(path))
    assert {name: read.fields[name] for name in said} == said
    for name, array in tensors.items():
        assert read.shapes[name] == array.shape
        np.testing.assert_array_equal(read.read(name), array)
    got = read.read(
        "blk.0.attn_q.weight"
    )  # a block of 32 has a scale in float16, its largest number over 127
    np.testing.assert_allclose(got, tensors["token_embd.weight"], atol=0.6)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"general.architecture": "gemma"}, "architecture llama"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "smollm"),
    ],
)
def test_other_models_are_refused(tmp_path, change, said):
    with pytest.raises(ConfigError, match=said):
        smollm2.write_folder(file(weights(), **change), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_text_leaves_out_what_is_held_out():
    squad = {
        "data": [{"title": "Prime_number", "paragraphs": [{"context": "A prime."}, {"context": "Two."}]}]
    }
    hotpot = [
        {"context": [["Prime number", ["A prime."]], ["Oslo", ["A city", " of Norway."]]]},
        {"context": [["Oslo", ["A city", " of Norway."]], ["Rome", ["Another."]]]},
        {"context": [["Prime number", ["A prime."]]]},
    ]
    assert list(smollm2.documents(hotpot, squad)) == [
        ("train", "Oslo\nA city of Norway."), ("train", "Rome\nAnother."), ("val", "A prime.\nTwo."),
    ]  # fmt: skip
