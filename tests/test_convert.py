"""Imports and exports: against published code's own outputs, and damaged checkpoints.

golden/models holds tiny random checkpoints with the logits, greedy tokens and gradients that
flash-linear-attention and transformers computed in float64.
"""

import functools
import json
import shutil
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
from hybridlm.errors import ConfigError
from hybridlm.rows import single_document
from tests import tiny
from tests.flags import on_eight_devices

GOLDEN = Path(__file__).parent / "golden" / "models"
NAMES = ("fla_deltanet", "fla_log_linear_mamba2", "fla_rwkv7", "kimi_linear", "minimax", "nemotron_h",
         "qwen3_next", "zamba2")  # fmt: skip
RUN = ("fla_gated_deltaproduct", "fla_mamba2", "fla_mla", "fla_rwkv6")  # all of these, once in a while
OTHERS = ("bailing_hybrid", "deepseek_v3", "falcon_mamba", "granitemoehybrid", "recurrent_gemma", "xlstm")
slow = lambda *names: [pytest.param(name, marks=pytest.mark.slow) for name in names]


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


EACH = [
    NAMES[0],
    *(pytest.param(name, marks=pytest.mark.once) for name in NAMES[1:]),
    *slow("fla_mom", *RUN, *OTHERS),
]


@pytest.mark.parametrize("name", EACH)
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


@pytest.mark.once
@pytest.mark.parametrize(
    "name", ["kimi_linear", "minimax", "zamba2", *slow("bailing_hybrid", "fla_rwkv7", *RUN)]
)
def test_greedy_continuation(name: str, root: Path) -> None:
    """Prefilled and decoded: KDA, MLA and experts; normed streams; a shared block; an MLP with memory."""
    run = imported(name, root)
    prompts = run.expected["input_ids"][:, : int(run.expected["prompt_len"])].tolist()
    want = run.expected["greedy_tokens"]
    with jax.default_matmul_precision("highest"):
        got = generate.continuations(run.definition, run.params, prompts, max_new_tokens=want.shape[1])
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["granitemoehybrid", "recurrent_gemma"])
def test_decoding_has_multipliers_and_caps(name: str, root: Path) -> None:
    """Greedy tokens are the likeliest of a whole pass over them."""
    run, length = imported(name, root), 9
    ids = run.expected["input_ids"][:, :length]
    with jax.default_matmul_precision("highest"):
        got = generate.continuations(run.definition, run.params, ids.tolist(), max_new_tokens=6)
    whole = evaluate.logits(run.definition, run.params, np.concatenate([ids, got], axis=1))
    np.testing.assert_array_equal(got, whole.argmax(-1)[:, length - 1 : -1])


STRETCHED = {
    "deepseek_v3": {"rope_theta": 30.0, "beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 0.707},
    "qwen3_next": {"rope_theta": 50.0, "partial_rotary_factor": 0.25},
}


@pytest.mark.parametrize("name", STRETCHED)
def test_yarn(name: str, tmp_path: Path) -> None:
    """Against transformers' logits: latents, and heads that turn in part, with the scales of each."""
    shutil.copytree(GOLDEN / name, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 2.0}
    config["rope_parameters"] = yarn | STRETCHED[name]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    incoming.import_hf(tmp_path / "hf", tmp_path / "run")
    definition, params = evaluate.load(tmp_path / "run")
    ids = np.load(GOLDEN / name / "expected.npz")["input_ids"]
    logits = evaluate.logits(definition, params, ids)
    assert error(logits[:, 4::10], np.load(GOLDEN / "yarn.npz")[name]) < 1e-5


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
    planned = families.plan(run.definition, source.family, source.values)
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
@pytest.mark.parametrize("name", ["qwen3_next", "zamba2"])
def test_training_goes_on_over_a_mesh(name: str, tmp_path: Path) -> None:
    """Gated DeltaNet, gated attention and experts, or a shared block, imported: 8 devices as one."""
    one, eight = np.array(on_eight_devices("tests.convert_mesh", GOLDEN / name, tmp_path))
    assert one[-1, 0] < one[0, 0] or name == "zamba2"  # its loss goes up and down in three steps
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(eight, one, rtol=5e-4)  # Adam turns rounding of small gradients into steps


def test_tensors_that_follow_from_the_config(tmp_path: Path) -> None:
    """MiniMax's decays: a folder may lack them but have no others; what an import kept is no parameter."""
    shutil.copytree(GOLDEN / "minimax", tmp_path / "hf")
    whole = tensors.Folder(GOLDEN / "minimax")
    values = {key: whole.read(key).astype(np.float32) for key in whole.tensors}
    decays = [key for key in values if key.endswith(("_decay", "slope_rate"))]
    assert len(decays) == 8
    write(tmp_path / "hf", {key: value for key, value in values.items() if key not in decays})
    incoming.import_hf(tmp_path / "hf", tmp_path / "lacking")
    outgoing.export_hf(tmp_path / "lacking", tmp_path / "without")
    assert tree(tmp_path / "without") == tree(tmp_path / "hf")
    outgoing.export_hf(tmp_path / "lacking", tmp_path / "anew", model_type="minimax")
    assert set(tensors.Folder(tmp_path / "anew").tensors) == set(values)
    write(tmp_path / "hf", values | {decays[0]: values[decays[0]] + 0.01})
    with pytest.raises(ConfigError, match="not what follows from"):
        incoming.import_hf(tmp_path / "hf", tmp_path / "other")
    write(tmp_path / "hf", values)
    incoming.import_hf(tmp_path / "hf", tmp_path / "run")
    write(tmp_path / "run" / "hf", {"model.norm.weight": np.zeros(16)}, incoming.DERIVED)
    outgoing.export_hf(tmp_path / "run", tmp_path / "out")
    np.testing.assert_array_equal(
        tensors.Folder(tmp_path / "out").read("model.norm.weight"), values["model.norm.weight"]
    )


@pytest.mark.parametrize("name", ["bailing_hybrid", "deepseek_v3"])
def test_layers_that_predict_further_tokens_are_left_out(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They stand after the others, as many as config.json says; the next one is unknown."""
    shutil.copytree(GOLDEN / name, tmp_path / "hf")
    whole = tensors.Folder(GOLDEN / name)
    values = {key: whole.read(key).astype(np.float32) for key in whole.tensors}
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    after = config["num_hidden_layers"]
    further = {f"model.layers.{after}.eh_proj.weight": np.ones((3, 2), np.float32)}
    write(tmp_path / "hf", values | further)
    incoming.import_hf(tmp_path / "hf", tmp_path / "run")
    assert f"left out, no part of the language model's forward pass: {next(iter(further))}" in caplog.text
    outgoing.export_hf(tmp_path / "run", tmp_path / "out")
    assert set(tree(tmp_path / "out")) == set(values)
    write(tmp_path / "hf", values | {f"model.layers.{after + 1}.eh_proj.weight": np.ones((3, 2))})
    with pytest.raises(ConfigError, match=f"unknown tensors: model.layers.{after + 1}"):
        incoming.import_hf(tmp_path / "hf", tmp_path / "other")


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
        init_from.described(tmp_path / "nowhere")


def test_a_dtype_without_room_for_a_number_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planned = {"a": tensors.Planned("model.safetensors", "F16", (2,))}
    with pytest.raises(ConfigError, match=r"--dtype = 'F16': cannot hold a, whose largest number is 7e\+04"):
        tensors.write(tmp_path, planned, lambda name: np.array([1, -7e4], np.float32))
    assert not caplog.text
    tensors.write(tmp_path, planned, lambda name: np.array([1, np.nan], np.float32))
    assert "a holds numbers that are not finite" in caplog.text
