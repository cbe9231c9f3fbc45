"""Imports and exports: against published code's own outputs, all families both ways, and damaged checkpoints.

golden/models holds tiny random checkpoints with the logits, greedy tokens and gradients that
flash-linear-attention and transformers computed in float64, and the names and shapes of the tensors of
eight families.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import generate, init_from, model
from hybridlm.convert import __main__ as command
from hybridlm.convert import evaluate, families, incoming, outgoing, tensors
from hybridlm.convert.family import same_model
from hybridlm.convert.fields import Fields
from hybridlm.errors import ConfigError
from hybridlm.rows import single_document
from tests import tiny
from tests.flags import FAST

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "models"
SHAPES = json.loads((GOLDEN / "shapes.json").read_text())
NAMES = ("fla_deltanet", "kimi_linear", "qwen3_next")


@functools.cache
def imported(name: str, root: Path) -> SimpleNamespace:
    workdir = root / name
    incoming.import_hf(GOLDEN / name, workdir)
    definition, params = evaluate.load(workdir)
    expected = dict(np.load(GOLDEN / name / "expected.npz"))
    return SimpleNamespace(workdir=workdir, definition=definition, params=params, expected=expected)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("imported")


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def tree(directory: Path) -> dict[str, tuple]:
    folder = tensors.Folder(directory)
    return {n: (t.dtype, t.shape, folder.read(n).tobytes()) for n, t in folder.tensors.items()}


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_bytes(name: str, root: Path, tmp_path: Path) -> None:
    run = imported(name, root)
    np.save(tmp_path / "ids.npy", run.expected["input_ids"])
    paths = [f"--{flag}={tmp_path / flag}.npy" for flag in ("ids", "out")]
    assert command.main(["logits", f"--workdir={run.workdir}", *paths]) == 0
    logits = np.load(tmp_path / "out.npy")
    assert logits.dtype == np.float32
    assert error(logits[:, ::3], run.expected["logits"]) < 1e-5
    assert command.main(["export", f"--workdir={run.workdir}", f"--hf={tmp_path / 'hf'}"]) == 0
    assert tree(tmp_path / "hf") == tree(GOLDEN / name)
    assert (tmp_path / "hf" / "config.json").read_bytes() == (GOLDEN / name / "config.json").read_bytes()


def test_greedy_continuation(root: Path) -> None:
    """KDA, MLA and experts, prefilled and decoded."""
    run = imported("kimi_linear", root)
    prompts = run.expected["input_ids"][:, : int(run.expected["prompt_len"])].tolist()
    want = run.expected["greedy_tokens"]
    with jax.default_matmul_precision("highest"):
        got = generate.generate(run.definition, run.params, prompts, max_new_tokens=want.shape[1])
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_gradients(root: Path) -> None:
    """Of the mean cross-entropy, for the parameters of up to 256 elements: norms, gates, biases, decays."""
    run = imported("qwen3_next", root)
    ids = run.expected["input_ids"]
    targets = np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], -1)], axis=1)
    batch = {"tokens": jnp.asarray(ids), "targets": jnp.asarray(targets)}
    batch |= dict(zip(("segment_ids", "positions"), single_document(*ids.shape), strict=True))
    with jax.default_matmul_precision("highest"):
        loss = lambda params: tiny.loss_fn(run.definition, params, batch)
        grads, sums = jax.jit(jax.grad(loss, has_aux=True))(run.params)
    assert sums["loss_sum"] / sums["tokens"] == pytest.approx(float(run.expected["loss"]), rel=1e-5)
    flat = model.unstack(run.definition, grads)
    source = families.read_config(GOLDEN / "qwen3_next")
    planned = families.plan(run.definition, source.family)
    compared = 0
    for rule in planned.rules:
        for theirs in rule.theirs:
            want = run.expected.get(f"grad.{theirs}")
            if want is not None:
                arrays = rule.outward([np.asarray(flat[name]) / sums["tokens"] for name in rule.ours])
                assert error(arrays[rule.theirs.index(theirs)], want) < 1e-4, theirs
                compared += 1
    assert compared == sum(name.startswith("grad.") for name in run.expected)


@pytest.mark.slow
def test_training_goes_on_over_a_mesh(tmp_path: Path) -> None:
    """Gated DeltaNet, gated attention and experts, imported: 8 devices give the losses of one."""
    flags = f"--xla_force_host_platform_device_count=8 {FAST}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.convert_mesh", GOLDEN / "qwen3_next", tmp_path]
    run = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    one, eight = np.array(json.loads(run.stdout.splitlines()[-1]))
    assert one[-1, 0] < one[0, 0]
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(eight, one, rtol=5e-4)  # Adam turns rounding of small gradients into steps


# Every family, without computing anything.

EXTRA = {
    "gla": {
        "model_type": "gla", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11, "fuse_norm": True,
    },
    "gla with convolutions, no gate": {
        "model_type": "gla", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
        "use_short_conv": True, "use_output_gate": False,
    },
    "gated_deltanet, sigmoid gate": {
        "model_type": "gated_deltanet", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
        "num_heads": 2, "head_dim": 8, "output_gate_activation": "sigmoid",
    },
    "hgrn": {
        "model_type": "hgrn", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 11,
        "attn": [
            {"layers": [0], "num_heads": 2, "window_size": 8},
            {"layers": [2], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 5e5},
        ],
    },
    "transformer": {
        "model_type": "transformer", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
        "num_heads": 4, "qk_norm": True, "tie_word_embeddings": True,
    },
    "kda, safe gate, grouped values": {
        "model_type": "kda", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11, "num_heads": 2,
        "num_v_heads": 4, "head_dim": 8, "safe_gate": True, "lower_bound": -5, "allow_neg_eigval": True,
    },
    "comba, grouped values": {
        "model_type": "comba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11, "num_heads": 2,
        "num_v_heads": 4, "head_dim": 8, "use_inner_decay": False, "correction_factor": 0.02,
    },
    "linear_attn": {
        "model_type": "linear_attn", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
    },
    "linear_attn, hedgehog": {
        "model_type": "linear_attn", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
        "feature_map": "hedgehog", "norm_feature_map": True, "attn": {"layers": [1], "num_heads": 2},
    },
    "qwen3_5_text": {
        "model_type": "qwen3_5_text", "hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 11,
        "head_dim": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
    },
    "qwen3_5_moe_text": {
        "model_type": "qwen3_5_moe_text", "hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 11,
        "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 3,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    },
    "olmo_hybrid": {
        "model_type": "olmo_hybrid", "hidden_size": 32, "num_hidden_layers": 5, "vocab_size": 11,
        "intermediate_size": 24, "num_attention_heads": 4, "rope_parameters": None, "rope_theta": None,
    },
}  # fmt: skip


EXTRA["kimi_linear, no shared expert"] = SHAPES["kimi_linear"]["config"] | {"num_shared_experts": 0}
EXTRA["kimi_linear, no shared expert"].pop("n_shared_experts", None)


@pytest.mark.parametrize("name", [*SHAPES, *EXTRA])
def test_configs_and_rules_of(name: str) -> None:
    """config.json -> definition -> config.json -> the same; rules invert; names are the published ones."""
    values = SHAPES[name]["config"] if name in SHAPES else EXTRA[name]
    family = families.FAMILIES[values["model_type"]]
    definition = model.build(family.read(Fields(values)).config())
    written = family.write(definition, values["model_type"])
    assert not same_model(definition, model.build(family.read(Fields(written)).config()))
    planned = families.plan(definition, family)
    if name in SHAPES:
        assert planned.shapes == {key: tuple(shape) for key, shape in SHAPES[name]["shapes"].items()}
    rng, sizes = np.random.default_rng(0), model.canonical_shapes(definition)
    for rule in planned.rules:
        ours = [rng.normal(size=sizes[entry].shape) for entry in rule.ours]
        for before, after in zip(ours, rule.inward(rule.outward(ours)), strict=True):
            np.testing.assert_array_equal(before, after)


def test_layers_of_released_configs() -> None:
    """Kimi Linear counts its layers from 1; Qwen3-Next places attention by an interval."""
    kimi = SHAPES["kimi_linear"]["config"] | {
        "num_hidden_layers": 27,
        "layer_types": None,
        "mlp_layer_types": None,
    }
    full = [4, 8, 12, 16, 20, 24, 27]
    kda = [layer for layer in range(1, 28) if layer not in full]
    kimi["linear_attn_config"] = kimi["linear_attn_config"] | {"full_attn_layers": full, "kda_layers": kda}
    kimi |= {"rope_theta": 10000.0, "rope_scaling": None, "moe_router_activation_func": "sigmoid"}
    kimi |= {
        "use_grouped_topk": True,
        "num_nextn_predict_layers": 0,
        "mla_use_nope": True,
        "moe_layer_freq": 1,
    }
    layers = families.FAMILIES["kimi_linear"].read(Fields(kimi)).layers
    assert layers == ["kda", *["kda/moe"] * 2, "mla/moe", *["kda/moe"] * 3, "mla/moe"] + [
        *["kda/moe"] * 3, "mla/moe",
    ] * 4 + ["kda/moe"] * 2 + ["mla/moe"]  # fmt: skip
    qwen = {
        k: v for k, v in SHAPES["qwen3_next"]["config"].items() if k not in ("layer_types", "rope_parameters")
    }
    qwen |= {
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 2,
        "mlp_only_layers": [],
    }
    found = families.FAMILIES["qwen3_next"].read(Fields(qwen))
    assert found.layers == ["gdn/moe", "full/moe"] * 2
    assert found.mixers["full"].rope_theta == 1e7


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("fla_deltanet", {"qk_norm": "sum"}, "qk_norm"),
        ("fla_deltanet", {"num_heads": 5}, "expand_k"),
        ("fla_deltanet", {"hidden_act": "powlu"}, "hidden_act"),
        ("fla_deltanet", {"attn": {"layers": [7], "num_heads": 4}}, "attn: layers"),
        ("fla_kda_hybrid", {"attn": {"layers": [1], "num_heads": 4, "rope_theta": None}}, "attn: rope_theta"),
        (
            "fla_kda_hybrid",
            {"attn": {"layers": [1], "num_heads": 4, "qk_norm": True}},
            "attn: qk_norm",
        ),
        ("fla_kda_hybrid", {"attnres_block_size": 2}, "attnres_block_size"),
        ("fla_retnet", {"feature_map": "relu"}, "feature_map"),
        ("qwen3_dense", {"attention_bias": True}, "attention_bias"),
        (
            "qwen3_dense",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope_parameters: rope_type",
        ),
        ("qwen3_dense", {"hidden_size": "64"}, "hidden_size"),
        ("qwen3_next", {"layer_types": ["linear_attention"]}, "layer_types"),
        ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope"),
        ("kimi_linear", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("kimi_linear", {"num_local_experts": 8}, "num_experts"),
        ("kimi_linear", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_a_config_may_not_ask_for(name: str, changes: dict, field: str) -> None:
    values = SHAPES[name]["config"] | changes
    with pytest.raises(ConfigError) as caught:
        families.FAMILIES[values["model_type"]].read(Fields(values))
    assert caught.value.field == f"config.json: {field}"


def test_what_fields_that_are_missing_or_null_stand_for() -> None:
    """The defaults of the published config classes, which are not those of other families."""
    retnet = {k: v for k, v in SHAPES["fla_retnet"]["config"].items() if k not in ("hidden_ratio",)}
    retnet |= {"intermediate_size": None, "hidden_size": 768, "num_heads": 4, "temperature": 0.6}
    read = lambda values: families.FAMILIES[values["model_type"]].read(Fields(values))
    assert read(retnet).model["mlp_hidden"] == 1024  # fla's RetNet has a ratio of 2
    assert read(retnet | {"hidden_ratio": None}).model["mlp_hidden"] == 2048
    hgrn2 = SHAPES["fla_hgrn2"]["config"] | {"hidden_size": 64, "num_heads": 3, "expand_ratio": 16}
    assert read(hgrn2).mixers["hgrn2"].num_heads == 4  # expand_ratio counts
    assert read(hgrn2 | {"num_heads": 2, "expand_ratio": None}).mixers["hgrn2"].head_dim == 32
    qwen3 = SHAPES["qwen3_dense"]["config"] | {"layer_types": None, "max_window_layers": 0}
    qwen3 |= {"use_sliding_window": True, "sliding_window": None}
    assert set(read(qwen3).layers) == {"full"}


def test_a_multimodal_config(tmp_path: Path) -> None:
    """Qwen3.5 is released around a vision tower: its text_config is the model, tied as the outer one says."""
    text = EXTRA["qwen3_5_text"] | {"tie_word_embeddings": False}
    outer = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": True, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    source = families.read_config(tmp_path)
    assert source.model_type == "qwen3_5_text" and source.config.model.tie_embeddings
    (tmp_path / "config.json").write_text(json.dumps(outer | {"text_config": None}))
    with pytest.raises(ConfigError, match="text_config"):
        families.read_config(tmp_path)


# Damaged folders. A change gets the folder's tensors and config, and may write files itself.


def truncate(values: dict, config: dict, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_shard(values: dict, config: dict, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {
        "weight_map": {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(values)}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write(folder, dict(list(values.items())[::2]), "model-00001-of-00002.safetensors")


def write(folder: Path, values: dict[str, np.ndarray], file: str = "model.safetensors") -> None:
    planned = {name: tensors.Planned(file, "F32", array.shape) for name, array in values.items()}
    tensors.write(folder, planned, values.__getitem__)


def store_as_int8(values: dict, config: dict, folder: Path) -> None:
    """The header says I8: as many bytes, four times as many elements."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32","shape":[101,64]', b'"I8" ,"shape":[404,64]'))


UP = "model.layers.0.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Callable, list[str]]] = {
    "truncated": (truncate, ["model.safetensors", "is cut short"]),
    "missing shard": (lose_a_shard, ["are missing: model-00002-of-00002.safetensors"]),
    "wrong dtype": (store_as_int8, ["dtypes other than F32, BF16, F16", "embeddings.weight I8"]),
    "transposed": (
        lambda values, config, folder: write(folder, values | {UP: values[UP].T}),
        [f"{UP} is [64, 96], must be [96, 64] (transposed?)"],
    ),
    "tied with both": (
        lambda values, config, folder: config.update(tie_word_embeddings=True),
        ["tie_word_embeddings is true", "lm_head.weight"],
    ),
    "unknown and missing": (
        lambda values, config, folder: write(
            folder, {(f"{k}_scale" if k in (UP, "model.norm.weight") else k): v for k, v in values.items()}
        ),
        [
            f"unknown tensors: {UP}_scale, model.norm.weight_scale",
            f"missing tensors: model.norm.weight [64], {UP}",
        ],
    ),
    "model_type": (
        lambda values, config, folder: config.update(model_type="gated_delta_net"),
        ["config.json: model_type", "Did you mean 'gated_deltanet'?"],
    ),
    "no weights": (
        lambda values, config, folder: (folder / "model.safetensors").unlink(),
        ["has no such file: model.safetensors"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "fla_deltanet", folder)
    whole = tensors.Folder(folder)
    values = {key: whole.read(key).astype(np.float32) for key in whole.tensors}
    config = json.loads((folder / "config.json").read_text())
    write(folder, values)
    change, messages = DAMAGES[name]
    change(values, config, folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert command.main(["import", f"--hf={folder}", f"--workdir={tmp_path / 'run'}"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    for message in messages:
        assert message in shown


def test_a_tied_head_that_is_stored_twice(tmp_path: Path) -> None:
    """Some tied checkpoints repeat the embedding as lm_head: accepted where equal, exported the same way."""
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "fla_deltanet", folder)
    whole = tensors.Folder(folder)
    values = {key: whole.read(key).astype(np.float32) for key in whole.tensors}
    write(folder, values | {"lm_head.weight": values["model.embeddings.weight"]})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    incoming.import_hf(folder, tmp_path / "run")
    outgoing.export_hf(tmp_path / "run", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(folder)


def test_shards_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new export in another dtype, sharded, imports again; another model_type than it has is refused."""
    incoming.import_hf(GOLDEN / "fla_deltanet", tmp_path / "run")
    monkeypatch.setattr(outgoing, "SHARD_BYTES", 50_000)
    outgoing.export_hf(tmp_path / "run", tmp_path / "hf", model_type="delta_net", dtype="BF16")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 3
    assert tree(tmp_path / "hf") == tree(GOLDEN / "fla_deltanet")
    families.read_config(tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"gla \(has no layer of this kind\)"):
        outgoing.export_hf(tmp_path / "run", tmp_path / "other", model_type="gla")
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        incoming.import_hf(GOLDEN / "fla_deltanet", tmp_path / "run")


def test_init_from(tmp_path: Path) -> None:
    """Layers by index: whole where the mixer is the same, the MLP alone where not; deeper layers new."""
    config = configs.default().to_dict()
    config["mixers"] = {
        "delta": configs.mixer("delta_net", num_heads=4, head_dim=16).to_dict(),
        "full": configs.mixer("attention", num_heads=4, head_dim=16).to_dict(),
    }
    config["model"] |= {"pattern": "delta full delta", "d_model": 64, "vocab_size": 101, "mlp_hidden": 96}
    config["data"]["path"] = "python-stdlib:"
    definition = model.build(configs.resolve(configs.ConfigDict(config)))
    fresh = jax.jit(lambda key: model.init(definition, key))(jax.random.key(0))
    params = init_from.start(str(GOLDEN / "fla_deltanet"), definition, fresh, tmp_path)
    report = init_from.Report(**json.loads((tmp_path / "init_from.json").read_text()))
    assert set(report.loaded) | set(report.new) == set(model.canonical_shapes(definition))
    lines = report.lines()
    assert "layer 0: loaded" in lines and "layer 2: new" in lines and "embedding: loaded" in lines
    (second,) = (line for line in lines if line.startswith("layer 1: "))
    assert "loaded mixer_norm.scale, mlp.down.kernel" in second
    assert "; new mixer.k_proj.kernel" in second
    assert "mixer.b_proj.kernel" in second.split("; dropped ")[1]
    folder = tensors.Folder(GOLDEN / "fla_deltanet")
    before, after = (model.unstack(definition, one) for one in (fresh, params))
    for name in report.new:
        np.testing.assert_array_equal(after[name], before[name])
    want = folder.read("model.layers.1.mlp.up_proj.weight").astype(np.float32).T
    np.testing.assert_array_equal(after["layers.1.mlp.up.kernel"], want)
    assert (tmp_path / "hf" / "manifest.json").is_file()
    with pytest.raises(ConfigError, match="neither a workdir with checkpoints nor a Hugging Face folder"):
        init_from.check(tmp_path / "nowhere")


def test_kimi_linear_with_a_tied_head_is_none():
    """transformers (5.24) ties nothing there: it would read the folder with a head at random."""
    fields = {"model.pattern": "kda*3 mla", "mixers.kda.output_gate_bias": False, "mixers.mla.num_heads": 4}
    fields |= {"mixers.mla.rope_theta": 0, "model.tie_embeddings": False}
    told = lambda **more: families.public_format(
        configs.resolve(
            configs.load("configs/quickstart.py", {n: str(v) for n, v in (fields | more).items()})
        )
    )
    assert told() == ("kimi_linear", "")
    model_type, reason = told(**{"model.tie_embeddings": True})
    assert model_type == "" and "has a head of its own" in reason
