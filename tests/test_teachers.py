"""Public checkpoints as teachers: exact conversions give the teacher's logits before any training."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import init_from, model, objectives, stages
from hybridlm.convert.tensors import shards, write
from hybridlm.errors import ConfigError
from hybridlm.member import Member
from hybridlm.objectives import TEACHER
from hybridlm.rows import Rows
from launch import grid

GOLDEN = Path(__file__).parent / "golden" / "models"
D, H, G, K, F, V = 32, 4, 2, 8, 48, 64
COMMON = {
    "hidden_size": D, "num_hidden_layers": 2, "intermediate_size": F, "vocab_size": V, "rope_theta": 1e4,
    "tie_word_embeddings": False,
}  # fmt: skip
FORMS = {
    "transformer": {"num_heads": H, "num_kv_heads": G, "norm_eps": 1e-6},
    "qwen3": {"num_attention_heads": H, "num_key_value_heads": G, "head_dim": K, "rms_norm_eps": 1e-6},
}
NAMES = {"transformer": ("embeddings", "norm", "attn_norm", "mlp_norm", "attn")}
NAMES["qwen3"] = ("embed_tokens", "norm", "input_layernorm", "post_attention_layernorm", "self_attn")


def written(form: str, folder: Path) -> Path:
    """A tiny random checkpoint of two layers of grouped attention, as FLA or transformers would have it."""
    rng = np.random.default_rng(0)
    weight = lambda *shape: (rng.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32)
    scale = lambda size: (1 + 0.1 * rng.normal(size=size)).astype(np.float32)
    embedding, last, before_mixer, before_mlp, mixer = NAMES[form]
    tensors = {f"model.{embedding}.weight": weight(V, D), f"model.{last}.weight": scale(D)}
    tensors["lm_head.weight"] = weight(V, D)
    for i in range(2):
        own = {before_mixer: scale(D), before_mlp: scale(D)}
        for name, heads in zip("qkv", (H, G, G), strict=True):
            own[f"{mixer}.{name}_proj"] = 2 * weight(heads * K, D)
        own[f"{mixer}.o_proj"] = weight(D, H * K)
        if form == "qwen3":
            own |= {f"{mixer}.{name}_norm": scale(K) for name in "qk"}
        own |= {"mlp.gate_proj": weight(F, D), "mlp.up_proj": weight(F, D), "mlp.down_proj": weight(D, F)}
        tensors |= {f"model.layers.{i}.{name}.weight": value for name, value in own.items()}
    files = shards([(name, "F32", value.shape) for name, value in tensors.items()], 10**9)
    write(folder, files, tensors.__getitem__)
    (folder / "config.json").write_text(json.dumps({"model_type": form, **COMMON, **FORMS[form]}))
    return folder


def started(folder: Path, change) -> tuple:
    """(teacher's definition and parameters, student's config, its parameters, what became of each)."""
    config = change()
    config.data = configs.data("copying", task="palindrome")
    config.model.update(dtype="float32", remat="none")
    config = configs.resolve(config)
    definition = model.build(config)
    with init_from.source(folder) as other:
        arrays = {name: jnp.asarray(np.asarray(array), jnp.float32) for name, array in other.arrays.items()}
        theirs = model.build(other_config(folder))
        fresh = jax.jit(lambda: model.init(definition, jax.random.key(0)))()
        params, report = init_from.load(other, definition, fresh)
    return theirs, model.restack(theirs, arrays), config, params, report


def other_config(folder: Path) -> configs.Config:
    return init_from.described(folder).replace(model__dtype="float32", model__remat="none")


def logits(definition, params, tokens):
    rows = Rows(jnp.ones_like(tokens), jnp.arange(tokens.shape[1]) * jnp.ones_like(tokens))
    return np.asarray(jax.jit(lambda p: model.logits(definition, p, tokens, rows))(params))


def kl(config, definition, params, teacher, tokens) -> float:
    """Nats a token of the distil objective."""
    objective = objectives.build(config.objective, definition)
    rows = {"segment_ids": jnp.ones_like(tokens), "positions": jnp.arange(tokens.shape[1]) + 0 * tokens}
    frozen = {TEACHER + name: leaf for name, leaf in teacher.items()}
    sums = jax.jit(objective.evaluate)(params, frozen, {"tokens": tokens, "targets": tokens, **rows})
    return float(sums["kl_loss_sum"] / sums["tokens"])


@pytest.mark.parametrize(("form", "mixer"), [("transformer", "mla"), ("qwen3", "swa")])
def test_exact_conversions(form, mixer, tmp_path):
    """One layer kept, the other an exact MLA, or a window longer than the text."""
    folder = written(form, tmp_path)
    spec = f"configs/linearise.py:teacher={folder},{mixer},1:1"
    theirs, teacher, config, params, report = started(folder, lambda: configs.load(spec))
    definition = model.build(config)
    assert config.model.pattern == f"{mixer} full" and not report.new and not report.dropped
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (2, 16)))
    expected = logits(theirs, teacher, tokens)
    assert expected.std() > 0.3
    np.testing.assert_allclose(logits(definition, params, tokens), expected, atol=1e-5)
    if form == "transformer":
        assert abs(kl(config, definition, params, teacher, tokens)) < 1e-6


def test_a_public_teacher_brings_its_tokenizer_and_no_text(tmp_path):
    """Text that nobody named, or the ids of another tokenizer, would be learnt without a word."""
    folder = written("qwen3", tmp_path)
    spec = f"configs/linearise.py:teacher={folder},gdn,1:1"
    load = lambda **more: configs.resolve(configs.load(spec, more))
    with pytest.raises(ConfigError, match=r"data\.path = '': must name files"):
        load()
    assert load(**{"data.path": "*.txt"}).data.tokenizer == "bytes"  # the folder has none
    (folder / "tokenizer.json").write_text("{}")
    assert load(**{"data.path": "*.txt"}).data.tokenizer == str(folder / "tokenizer.json")


def test_a_public_teacher_must_stay_as_it_was(tmp_path):
    (tmp_path / "teacher").mkdir()
    folder = written("qwen3", tmp_path / "teacher")
    config = configs.load(f"configs/linearise.py:teacher={folder},gdn,1:1", {"data.path": "*.txt"})
    config.data = configs.data("copying", task="palindrome")
    (_, stage), *_ = stages.split(configs.resolve(config), configs.resolve)
    run = Member(stage, tmp_path / "run", None, np.arange(stage.train.batch_size))
    run.check_teacher()
    [weights] = folder.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-8] + bytes(8))
    with pytest.raises(ConfigError, match=r"or other files, than when this run began.*Bring those back"):
        run.check_teacher()
    run.record["teacher"] = dict.fromkeys(run.record["teacher"], "")  # of a version that knew none
    run.check_teacher()
    run.saved["teacher"] = run.teachers()  # as a resumption finds it
    weights.write_bytes(content)
    with pytest.raises(ConfigError, match="or other files"):
        run.check_teacher()


def test_norms_stay_where_they_stand(tmp_path):
    """MiniMax's softmax attention with a window that sees all: its blocks still norm the stream."""
    spec = f"configs/linearise.py:teacher={GOLDEN / 'minimax'},swa,pure"
    theirs, teacher, config, params, _ = started(GOLDEN / "minimax", lambda: configs.load(spec))
    assert "swa.mixer=1.1/0.9" in config.model.stream_norm
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 32, (2, 16)))
    expected = logits(theirs, teacher, tokens)
    np.testing.assert_allclose(logits(model.build(config), params, tokens), expected, atol=1e-5)


@pytest.mark.slow
def test_golden_teacher(tmp_path):
    """Every layer of a golden Qwen3-Next kept: public code's logits."""
    folder = GOLDEN / "qwen3_next"

    def kept():
        config = configs.ConfigDict(other_config(folder).to_dict())
        config.objective = configs.objective("distil", teacher=str(folder))
        return config

    _, _, config, params, report = started(folder, kept)
    assert not report.new and not report.dropped and not report.mapped
    with np.load(folder / "expected.npz") as expected:
        tokens, wanted = jnp.asarray(expected["input_ids"]), expected["logits"]
    definition = model.build(config)
    found = logits(definition, params, tokens)[:, ::3]
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("part", ["", ",seeds", ",0+1"])
def test_the_study_trains_a_fifth_of_the_teachers_steps(part, monkeypatch):
    teacher = init_from.described(GOLDEN / "minimax").replace(train__steps=200)
    monkeypatch.setattr(init_from, "described", lambda _: teacher)
    found = grid.load(f"configs/sweeps/study_linearise.py:teacher{part}").fields
    steps = [found[f"stages.{stage}.train.steps"] for stage in ("transfer", "distil")]
    assert steps == [2, 38]


@pytest.mark.parametrize("part, steps, problem", [(",seed", 200, "such as 0+1+7"), ("", 99, "at least 20")])
def test_what_the_study_refuses(part, steps, problem, monkeypatch):
    teacher = init_from.described(GOLDEN / "minimax").replace(train__steps=steps)
    monkeypatch.setattr(init_from, "described", lambda _: teacher)
    with pytest.raises(ConfigError, match=re.escape(problem)):
        grid.load(f"configs/sweeps/study_linearise.py:teacher{part}")
