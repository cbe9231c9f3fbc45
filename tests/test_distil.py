"""Learning from a teacher: the chunked KL, the objective's terms, and a run in stages."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import (
    config_file,
    distillation,
    fit,
    init_from,
    layer_choice,
    loop,
    loss,
    mimicry,
    model,
    program,
    sharding,
    stages,
    trainer,
    weights,
)
from hybridlm.errors import ConfigError, Stopped
from hybridlm.objectives import TEACHER, distil
from hybridlm.rows import Rows
from tests import tiny


def dense(hidden, head, seen, teacher_head, targets, w):
    """The weighted sum with whole logits."""
    logits, z = hidden @ head, seen @ teacher_head
    logits, z = (cap * jnp.tanh(x / cap) if cap else x for x, cap in zip((logits, z), w.caps, strict=True))
    if w.top_k:
        z = jnp.where(z >= jnp.sort(z, axis=-1)[..., -w.top_k, None], z, -1e30)
    p = jax.nn.softmax(z / w.temperature)
    entropies = -jnp.sum(p * jax.nn.log_softmax(logits / w.temperature), axis=-1)
    own = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-38)), 0), axis=-1)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    each = w.kl * w.temperature**2 * (entropies - own) - w.cross_entropy * picked
    return jnp.sum(jnp.where(targets >= 0, each, 0))


def test_distilled(monkeypatch):
    """Value and gradients against whole logits, in several chunks, with tokens left out."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 8)
    monkeypatch.setattr(loss, "HEAD_REUSE", 0)
    keys = jax.random.split(jax.random.key(0), 5)
    hidden, seen = (jax.random.normal(key, (2, 5, width)) for key, width in zip(keys, (3, 4), strict=False))
    head, teacher_head = jax.random.normal(keys[2], (3, 8)), jax.random.normal(keys[3], (4, 8))
    targets = jax.random.randint(keys[4], (2, 5), 0, 8).at[0, 3:].set(-1)
    capped = distillation.Weights(0.5, 2.0, 3.0, caps=(1.5, 2.5))
    for w in (capped, distillation.Weights(0.0, 1.0, 1.0, top_k=3)):
        ours = lambda h, m, w=w: distillation.distilled(
            h, m, distillation.Teacher(seen, teacher_head), targets, w
        )[0]
        theirs = lambda h, m, w=w: dense(h, m, seen, teacher_head, targets, w)
        found, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, head) for f in (ours, theirs))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


def test_mimicry(monkeypatch):
    """Sums and gradients of the weights' cross-entropy against whole weights, over blocks, documents, grouped
    keys and tokens that do not count."""
    monkeypatch.setattr(mimicry, "BLOCK", 4)
    keys = jax.random.split(jax.random.key(0), 4)
    make = lambda key, heads, width: jax.random.normal(key, (2, 1, 7, heads, width))
    theirs = mimicry.Heads(make(keys[0], 4, 3), make(keys[1], 2, 3))
    ours = mimicry.Heads(*(jnp.exp(make(key, 4, 5)) for key in keys[2:]))
    segments, counted = jnp.array([[1, 1, 1, 2, 2, 2, 2]]), jnp.ones((1, 7), bool).at[0, 6].set(False)
    rows = Rows(segments, jnp.zeros((1, 7), jnp.int32))
    seen = (segments[0][:, None] == segments[0]) & (jnp.arange(7)[:, None] >= jnp.arange(7))

    def dense(ours):
        logits = jnp.einsum("nbihk,nbjhk->nbhij", theirs.q, jnp.repeat(theirs.k, 2, 3)) * 0.7
        A = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        f = jnp.where(seen, jnp.einsum("nbihf,nbjhf->nbhij", *ours), 0)
        log_L = jnp.log(jnp.where(seen, f / f.sum(-1, keepdims=True), 1))
        return (-(A * log_L).sum(-1).mean(2) * counted).sum((1, 2))

    blocks = lambda ours: mimicry.cross_entropy(theirs, ours, rows, counted, 0.7)
    for one in (lambda f, ours: f(ours), lambda f, ours: jax.grad(lambda o: f(o).sum())(ours)):
        found, wanted = (jax.jit(lambda ours, f=f, one=one: one(f, ours))(ours) for f in (blocks, dense))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


@pytest.fixture(scope="module")
def teacher(text, tmp_path_factory):
    """A trained run of two layers of attention."""
    workdir = tmp_path_factory.mktemp("teacher")
    trainer.train(configs.resolve(tiny.config(text, model__pattern="full*2", train__steps=2)), workdir)
    return workdir


def student(text, teacher):
    """full, then retnet in the place of the second layer: transfer of that mixer alone, then all by KL."""
    c = tiny.config(text, model__pattern="full retnet", checkpoint__every_steps=2, eval__every_steps=2)
    c.checkpoint.keep_last = 9
    c.mixers.retnet.v_head_dim = 8
    c.init_from = str(teacher)
    c.objective = configs.objective("distil", teacher=str(teacher), kl=1.0, hidden=0.5, next_token=0.1)
    frozen = ("embedding", "head", "final_norm*", "layers.0.*", "layers.1.m*_norm*", "layers.1.mlp.*")
    c.stages = {
        "order": ("transfer", "distil", "tune"),
        "transfer": {
            "train": {"steps": 3},
            "objective": {"kl": 0.0, "hidden": 0.0, "next_token": 0.0, "transfer": 1.0},
            "optimizer": {"freeze": frozen, "learning_rate": 0.002, "weight_decay": 0.5},
        },
        "distil": {"train": {"steps": 2, "microbatches": 2}},
        "tune": {"train": {"steps": 1, "seq_len": 8}, "objective": {"kind": "next_token"}},
    }
    return configs.resolve(c)


@pytest.fixture(scope="module")
def whole(text, teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("student")
    trainer.train(student(text, teacher), workdir)
    return workdir


@pytest.mark.once
def test_stages(text, teacher, whole):
    """What each stage trains and says; while the others are frozen they stay bit for bit."""
    config = student(text, teacher)
    begins = [begin for begin, _ in stages.split(config, configs.resolve)]
    assert config.train.steps == 6 and begins == [0, 3, 5]
    assert configs.resolve(config_file.from_json(whole / "config.json")) == config
    lines = {line["step"]: line for line in tiny.lines(whole)}
    assert lines[1]["loss"] == pytest.approx(lines[1]["transfer_loss"]) and "accuracy" not in lines[1]
    assert lines[3]["val_transfer_loss"] < lines[2]["val_transfer_loss"]  # of the same held-out batches
    assert {"loss", "kl_loss", "hidden_loss", "accuracy"} <= set(lines[4]) and "kl_loss" not in lines[6]
    assert {"val_loss", "val_transfer_loss", "val_transfer_1_loss"} <= set(lines[2])
    assert lines[4]["learning_rate"] == pytest.approx(0.005)  # of a schedule that began anew
    before, after = weights.load(teacher), weights.load(whole, 2)
    old, new = (model.unstack(one.definition, one.params) for one in (before, after))
    moved = [name for name in new if name not in old or not np.array_equal(old[name], new[name])]
    assert moved and all(name.startswith("layers.1.mixer.") for name in moved)


@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.slow
def test_resumed_in_any_stage(text, teacher, whole, tmp_path, step, monkeypatch):
    """A run that was stopped after a step of any stage, or between two, writes the same lines."""
    run = tmp_path / "run"
    config = student(text, teacher)
    save = loop.Loop.save

    def stop(self, at, *args):
        save(self, at, *args)
        if at == step:
            raise Stopped("as if killed")

    monkeypatch.setattr(loop.Loop, "save", stop)
    with pytest.raises(Stopped):
        trainer.train(config, run)
    monkeypatch.undo()
    trainer.train(config, run)
    assert tiny.lines(run) == tiny.lines(whole)


@pytest.mark.once
def test_the_teacher_must_stay_as_it_was(text, teacher, whole, tmp_path, monkeypatch):
    """A run that is resumed in a stage with a teacher whose folder was trained further meanwhile is refused;
    one in a stage without a teacher is not."""
    run, other = tmp_path / "run", tmp_path / "teacher"
    shutil.copytree(whole, run)
    shutil.copytree(teacher, other)
    before = init_from.identity(other)
    assert before == init_from.identity(teacher) and init_from.identity(tmp_path) == ""
    shutil.rmtree(other / "checkpoints")
    shutil.copytree(whole / "checkpoints", other / "checkpoints")
    moved = init_from.identity(other)
    assert moved != before
    monkeypatch.setattr(init_from, "identity", lambda path: moved)
    shutil.rmtree(run / "checkpoints" / "6")
    trainer.train(student(text, teacher), run)
    assert [line["step"] for line in tiny.lines(run)] == list(range(1, 7))
    for step in (5, 6):
        shutil.rmtree(run / "checkpoints" / str(step))
    for spelt in (teacher, os.path.relpath(teacher), f"{teacher}/"):
        with pytest.raises(ConfigError, match="has another newest checkpoint, or other files, than"):
            trainer.train(student(text, spelt), run)


def test_nothing_to_learn_from_oneself(text, teacher):
    """A student that is the teacher has no KL, no angle and no gradient; transfer is refused."""
    c = tiny.config(text, model__pattern="full*2")
    definition = model.build(configs.resolve(c))
    settings = distil.Config(kind="distil", teacher=str(teacher), kl=1.0, hidden=1.0)
    objective = distil.Objective(settings, definition)
    params = weights.load(teacher).params
    row = jnp.ones((2, 6), jnp.int32)
    batch = {
        "tokens": row,
        "targets": row.at[0, 4:].set(-1),
        "segment_ids": row,
        "positions": jnp.arange(6) * row,
    }
    frozen = {TEACHER + name: leaf for name, leaf in params.items()}
    grad = jax.jit(jax.value_and_grad(lambda p: objective.loss(p, frozen, batch), has_aux=True))
    (_, sums), grads = grad(params)
    np.testing.assert_allclose([sums["kl_loss_sum"], sums["hidden_loss_sum"]], 0, atol=1e-5)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-4
    with pytest.raises(ConfigError, match="nothing to transfer"):
        distil.Objective(distil.Config(kind="distil", teacher=str(teacher), transfer=1.0), definition)


def test_layers_that_learn_alone(text, teacher):
    """Transfer by cosine and the mimicry of weights are of what the layers make of the teacher's inputs."""
    c = tiny.config(text, model__pattern="full map")
    hedgehog = {"feature_map": "hedgehog", "rope_theta": 1e4}
    c.mixers.map = configs.mixer("feature_map", num_heads=4, head_dim=8, **hedgehog)
    definition = model.build(configs.resolve(c))
    kinds = {"kl": 0.0, "transfer": 2.0, "transfer_by": "cosine", "weights": 3.0}
    objective = distil.Objective(distil.Config(kind="distil", teacher=str(teacher), **kinds), definition)
    theirs = weights.load(teacher)
    tokens = jnp.arange(12).reshape(2, 6)
    rows = Rows(jnp.ones_like(tokens), jnp.arange(6) * jnp.ones_like(tokens))
    batch = {"tokens": tokens, "targets": tokens, "segment_ids": rows[0], "positions": rows[1]}

    @jax.jit
    def both(key):
        params = model.init(definition, key)
        frozen = {TEACHER + name: leaf for name, leaf in theirs.params.items()}
        found = objective.loss(params, frozen, batch)
        taps = ("block.*", "q", "k")
        _, before = model.merge(theirs.definition, theirs.params).forward(tokens, rows, taps)
        inputs = jnp.stack([before[f"layers.{i}.block.input"] for i in range(2)])
        taps = ("block.mixed", "features.?")
        return found, before, model.merge(definition, params).forward(tokens, rows, taps, inputs)[1]

    (total, sums), before, after = jax.device_get(both(jax.random.key(3)))
    a, b = (one["layers.1.block.mixed"] for one in (before, after))
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    q, k, f_q, f_k = (
        one[f"layers.1.{name}"]
        for one, name in ((before, "q"), (before, "k"), (after, "features.q"), (after, "features.k"))
    )
    A = np.exp(np.einsum("bihk,bjhk->bhij", q, k) * 8**-0.5)
    L = np.einsum("bihk,bjhk->bhij", f_q, f_k)
    A, L = (np.tril(x) / np.tril(x).sum(-1, keepdims=True) for x in (A, L))
    entropy = -(A * np.log(L + (A == 0))).sum(-1).mean(1).sum()
    np.testing.assert_allclose(sums["transfer_loss_sum"], (1 - cosine).sum(), rtol=1e-4)
    np.testing.assert_allclose(sums["weights_loss_sum"], entropy, rtol=1e-4)
    np.testing.assert_allclose(total, 2 * (1 - cosine).sum() + 3 * entropy, rtol=1e-4)
    retnet = model.build(configs.resolve(tiny.config(text, model__pattern="full retnet")))
    with pytest.raises(ConfigError, match="layer 1 must be a positive feature_map"):
        distil.Objective(distil.Config(kind="distil", teacher=str(teacher), weights=1.0), retnet)


@pytest.mark.once
def test_layer_choice(whole, capsys, monkeypatch):
    """Ranks the one layer that was replaced, and names the pattern that keeps it, and what is full then."""
    layer_choice.show(whole, keep=1, batches=1)
    record = json.loads((whole / "layer_choice.json").read_text())
    assert (
        record["pattern"] == "full*2"
        and record["keep"] == "0+1"
        and "--config.model.pattern" in capsys.readouterr().out
    )
    assert record["losses"]["1"] > 0 and record["teacher"] > 0
    assert (whole / "layer_choice.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(
        init_from, "described", lambda path: configs.resolve(tiny.config("x", model__d_model=8))
    )
    with pytest.raises(ConfigError, match=r"has \(d_model, layers\) \(16, 2\), .* came from \(8, 2\)"):
        layer_choice.show(whole, keep=1, batches=1)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"order": "transfer"}, "must be a tuple"),
        ({"order": ("a",)}, "there is no such stage"),
        ({"order": 5}, "must be a tuple"),
        ({"a": {"train": {"steps": 1}}}, "must name the stages"),
        ({"order": ("a",), "a": {"optimizer": {"learning_rate": 0.1}}}, r"stages.a.train.steps .*how long"),
        ({"order": ("a",), "a": {"train": {"steps": 1}, "model": {}}}, "train, optimizer, objective at most"),
        ({"order": ("a",), "a": {"train": {"steps": 1}, "optimizer": {"ema": 0.9}}}, "must be 0 in a run"),
        ({"order": ("a",), "a": {"train": {"steps": 0}}}, r"stages.a.train.steps = 0: must be at least 1"),
    ],
)
def test_stages_that_cannot_be(text, fields, match):
    c = tiny.config(text)
    c.stages = fields
    with pytest.raises(ConfigError, match=match):
        configs.resolve(c)


def test_a_later_stage_is_refused_before_the_first(text, teacher, tmp_path):
    taught = {"kind": "distil", "teacher": str(teacher), "transfer": 1.0}
    for later, match in {
        "train.batch_size = 9999: is more than": {"train": {"steps": 1, "batch_size": 9999}},
        "matches no parameter": {"train": {"steps": 1}, "optimizer": {"groups": ("nobody=2",)}},
        "objective.teacher = .*has the mixers of this": {"train": {"steps": 1}, "objective": taught},
    }.items():
        c = tiny.config(text, model__pattern="full*2")
        c.stages = {"order": ("a", "b"), "a": {"train": {"steps": 1}}, "b": match}
        with pytest.raises(ConfigError, match=later):
            trainer.train(configs.resolve(c), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_profile_is_of_the_runs_steps_or_of_its_stages(text):
    c = tiny.config(text, train__profile_steps=(4, 5))
    b = {"steps": 3, "profile_steps": (1, 2)}
    c.stages = {"order": ("a", "b", "c"), "a": {"train": {"steps": 3}}, "b": {"train": b}}
    c.stages["c"] = {"train": {"steps": 9}}
    windows = [one.train.profile_steps for _, one in stages.split(configs.resolve(c), configs.resolve)]
    assert windows == [(4, 5), (4, 5), (4, 5)]
    c.train.profile_steps = ()
    windows = [one.train.profile_steps for _, one in stages.split(configs.resolve(c), configs.resolve)]
    assert windows == [(), (4, 5), ()]


def test_a_teacher_may_be_an_average(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    with pytest.raises(ConfigError, match=rf"^init_from = '{path.parent}:ema': the run kept no average"):
        init_from.described(f"{path.parent}:ema")
    path.write_text(path.read_text().replace('"ema": 0.0', '"ema": 0.5'))
    assert init_from.described(f"{path.parent}:ema") == configs.of_run(path.parent)


def test_what_is_wrong_with_a_teacher_is_said_of_it(teacher, text, tmp_path):
    """Not of init_from, nor of the flag of another command (--workdir, --hf)."""
    definition = model.build(configs.resolve(tiny.config(text)))
    broken = {name: tmp_path / name for name in ("empty", "hf", "run")}
    for folder in broken.values():
        folder.mkdir()
    (broken["hf"] / "config.json").write_text("{}")
    (broken["run"] / "checkpoints").mkdir()
    for path in (tmp_path / "none", *broken.values(), f"{teacher}:ema", f"{tmp_path}/none:ema"):
        with pytest.raises(ConfigError, match=rf"^objective\.teacher = '{path}"):
            distil.Objective(distil.Config(kind="distil", teacher=str(path)), definition)
        with pytest.raises(ConfigError, match=rf"^init_from = '{path}"):
            init_from.described(path)


def test_stage_on_a_command_line():
    overrides = {
        "stages.order": "a",
        "stages.a.train.steps": "7",
        "stages.a.objective.z_loss": "0.5",
        "stages.a.optimizer.learning_rate": "0.1",
    }
    config = configs.resolve(configs.load("configs/quickstart.py", overrides))
    [(begin, one)] = stages.split(config, configs.resolve)
    assert (begin, one.train.steps, one.objective.z_loss, one.optimizer.learning_rate) == (0, 7, 0.5, 0.1)
    with pytest.raises(ConfigError, match="no such field"):
        configs.load("configs/quickstart.py", {"stages.a.train.stepz": "7"})
    assert "stages" not in configs.resolve(configs.load("configs/quickstart.py")).to_dict()


@pytest.mark.once
def test_microbatches_of_a_stage_are_found(text, teacher, monkeypatch):
    """The terms of a teacher are sums over tokens: where memory lacks, a batch is split for them, too."""
    monkeypatch.setattr(fit, "_memo", lambda *_: None)
    monkeypatch.setattr(fit, "LEAST_TOKENS", 1)
    given = student(text, teacher)
    for _, one in stages.split(given.replace(model__remat="auto"), configs.resolve)[:2]:
        config = one.replace(train__batch_size=4, train__microbatches=0)
        mesh, definition = sharding.make_mesh(config.mesh), model.build(config)
        row = jax.ShapeDtypeStruct((4, config.train.seq_len), np.int32)
        batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), row)

        def trace(config, definition, mesh=mesh, batch=batch):
            built = program.build(config, definition, mesh, None)
            with jax.set_mesh(mesh):
                return built.step.trace(built.shapes, batch, *built.teacher)

        chosen = [fit.parted(config, definition, mesh, trace, size) for size in (2**10, 2**34)]
        assert [found.train.microbatches for found in chosen] == [4, 1]
