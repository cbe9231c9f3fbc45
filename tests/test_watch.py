"""Updates that are not finite, jumps of loss and gradient, and the replay of a step that went wrong."""

import json
import math
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hybridlm import config as configs
from hybridlm import member, model, program, schema, sharding, trainer
from hybridlm.errors import ConfigError, RunError
from hybridlm.objectives import next_token
from hybridlm.run import replay, watch
from hybridlm.run.checkpoint import Checkpoints
from tests import tiny


def resolved(text, **fields):
    return configs.resolve(tiny.config(text, model__pattern="retnet", **fields))


def poison(monkeypatch, config, steps):
    """Makes the loss of ``steps`` nan, in the compiled program, by the sum of their tokens."""
    source = member.build_data(config, "train")
    sums = [int(source.batch(step - 1)["tokens"].sum()) for step in range(1, config.train.steps + 1)]
    bad = [sums[step - 1] for step in steps]
    assert all(sums.count(one) == 1 for one in bad), "two batches with one sum"
    honest = next_token.Objective.loss

    def loss(self, params, frozen, batch, wanted=()):
        total, sums = honest(self, params, frozen, batch, wanted)
        struck = jnp.isin(jnp.sum(batch["tokens"]), jnp.array(bad))
        return total * jnp.where(struck, jnp.nan, 1.0), sums

    monkeypatch.setattr(next_token.Objective, "loss", loss)
    return source


def events(workdir):
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]


@pytest.mark.once
def test_updates_that_are_not_finite_are_skipped_counted_and_named(text, tmp_path, monkeypatch):
    config = resolved(text, train__steps=8, checkpoint__every_steps=4)
    source = poison(monkeypatch, config, [3, 4, 6])
    trainer.train(config, tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as saves:
        assert saves.record(4)["skipped"] == [2, 2] and saves.record(8)["skipped"] == [3, 0]
        mesh = sharding.make_mesh(schema.Mesh(1, 1, 1))
        built = program.build(config, model.build(config), mesh, source.token_bytes)
        with jax.set_mesh(mesh):
            _, join, like = program.by_layer(model.build(config), built)
            end = join(saves.restore(8, like))
            state = built.init(jax.random.key(config.train.seed))
            for step in (1, 2, 5, 7, 8):  # as if the others had never been there
                state, _ = built.step(state, sharding.put_batch(source.batch(step - 1), mesh))
    jax.tree.map(np.testing.assert_array_equal, state, end)
    assert [line["skipped"] for line in tiny.lines(tmp_path)] == [0, 0, 1, 2, 2, 3, 3, 3]
    assert [event["step"] for event in events(tmp_path)] == [3, 4, 6]
    for event in events(tmp_path):
        assert event["event"] == "skipped" and event["grad_norm"] == "nan" and event["first"] == "head"
        assert event["samples"] == source.sample_ids(event["step"] - 1) and len(event["samples"]) == 8

    shorter = tiny.lines(tmp_path)
    for path in (tmp_path / "checkpoints" / "8").rglob("*"):
        if path.is_file():
            path.unlink()
    trainer.train(config, tmp_path)  # from step 4, in the middle of a row of two
    assert tiny.lines(tmp_path) == shorter
    assert [event["step"] for event in events(tmp_path)] == [3, 4, 6]


@pytest.mark.once
def test_an_update_that_is_not_finite_is_skipped(text, tmp_path, caplog):
    """Where its loss and gradient are: the second, by the decay of weights that the first made huge."""
    huge = {"learning_rate": 1e9, "weight_decay": 1e9, "groups": ("head=99999/99999",), "warmup_steps": 0}
    options = {f"optimizer__{name}": value for name, value in (huge | {"freeze": ("*", "!head")}).items()}
    config = resolved(text, train__max_skipped=1, **options)
    with pytest.raises(RunError, match="update is not finite, 2 updates in a row since step 2"):
        trainer.train(config, tmp_path)
    assert "step 2: update skipped, which is not finite where its gradient is" in caplog.text
    assert [math.isfinite(event["grad_norm"]) for event in events(tmp_path)] == [True, True]
    source, mesh = member.build_data(config, "train"), sharding.make_mesh(schema.Mesh(1, 1, 1))
    built = program.build(config, model.build(config), mesh, None)
    with jax.set_mesh(mesh), Checkpoints(tmp_path / "dump-2" / "checkpoints") as saves:
        _, join, like = program.by_layer(model.build(config), built)
        end, start = join(saves.restore(saves.steps()[-1], like)), built.init(jax.random.key(0))
        first, metrics = built.step(start, sharding.put_batch(source.batch(0), mesh))
    jax.tree.map(np.testing.assert_array_equal, first, end)
    assert metrics["update_finite"] and np.isfinite(end["params"]["head"]).all()


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run_with_a_dump_that_repeats_the_first(text, tmp_path, capsys):
    config = resolved(
        text,
        train__steps=9,
        train__max_skipped=2,
        checkpoint__every_steps=2,
        optimizer__learning_rate=1e9,
        optimizer__warmup_steps=0,
    )
    with pytest.raises(RunError, match=r"step (\d): .* 3 updates in a row since step (\d)") as caught:
        trainer.train(config, tmp_path)
    with pytest.raises(RunError, match=r"3 updates in a row since step"):
        trainer.train(config, tmp_path)  # once more comes to the same end, and writes the same dump
    first = events(tmp_path)[0]["step"]
    assert [event["step"] for event in events(tmp_path)] == [first, first + 1, first + 2]
    dump = tmp_path / f"dump-{first}"
    assert f"python -m hybridlm.run.replay {dump} repeats step {first}" in str(caught.value)
    step, metrics, squares = replay.replay(dump)
    assert step == first and str(metrics["loss"]) == str(events(tmp_path)[0]["loss"])
    assert watch.first_not_finite(squares) == events(tmp_path)[0]["first"]
    assert replay.main([str(dump)]) == 0
    assert f"first that is not finite: {events(tmp_path)[0]['first']}" in capsys.readouterr().out
    assert replay.main([str(tmp_path / "gone")]) == 2 and not (tmp_path / "gone").exists()
    whole = (dump / "batch.npz").read_bytes()
    for content in (b"", whole[:99], whole[:-9] + bytes(9), b"x" * 99):
        (dump / "batch.npz").write_bytes(content)
        with pytest.raises(ConfigError, match=r"DUMP = .*batch.npz': is no batch of a dump"):
            replay.replay(dump)
    (dump / "batch.npz").write_bytes(whole)
    shutil.rmtree(dump / "checkpoints")
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        replay.replay(dump)


def test_a_dump_of_a_stage_has_the_stages_schedule(text, tmp_path, monkeypatch):
    """What a stage of 6 steps that begins after 3 is replayed with: its own count of updates goes to 6, and
    its microbatches are those that there were."""
    config = resolved(text, train__steps=9, train__profile_steps=(8, 9))
    one = member.Member(config, tmp_path, None, np.arange(config.train.batch_size), begin=3)
    one.watch = types.SimpleNamespace(in_a_row=2)
    kept = []
    monkeypatch.setattr(replay, "dump", lambda path, *given: kept.append(given))
    one.give_up(8, {}, 2)
    [(dumped, first, _, batch)] = kept
    assert (first, dumped.train.steps, dumped.train.microbatches) == (7, 6, 2)
    assert configs.resolve(ConfigDict(dumped.to_dict())) == dumped
    np.testing.assert_array_equal(batch["tokens"], member.build_data(config, "train").batch(6)["tokens"])


def test_the_first_parameter_is_the_one_nearest_to_the_loss(text):
    """A parameter of layer 1 of 3 is made nan: its own layer and what lies below get nan, nothing above."""
    config = configs.resolve(tiny.config(text, model__pattern="retnet*3"))
    definition = model.build(config)
    params = model.init(definition, jax.random.key(0))
    grads = model.unstack(definition, jax.tree.map(jnp.ones_like, params))
    names = ["layers.1.mixer.o_proj.kernel", "layers.0.mixer.q_proj.kernel", "embedding"]
    for name in names:
        grads[name] = jnp.full_like(grads[name], jnp.nan)
    norms = program.squared_norms(model.restack(definition, grads))
    squares = watch.by_parameter(jax.device_get(norms), definition)
    assert watch.first_not_finite(squares) == names[0]
    assert {name for name, value in squares.items() if not math.isfinite(value)} == set(names)
    others = {name: leaf.size for name, leaf in grads.items() if name not in names}
    assert {name: squares[name] for name in others} == others
    assert watch.first_not_finite(others) == "none"


@pytest.mark.parametrize(
    ("loss", "norm", "event"),
    [(2.5, 1.0, "loss spike"), (2.0, 9.0, "gradient spike"), (2.05, 2.0, None), (1.0, 0.1, None)],
)
def test_jumps_are_reported_with_their_samples(text, tmp_path, loss, norm, event, caplog):
    config = resolved(text)
    watched = watch.Watch(tmp_path / "events.jsonl", model.build(config), lambda step: [f"batch {step}"], 0)
    squares = program.squared_norms(
        jax.tree.map(jnp.ones_like, model.init(model.build(config), jax.random.key(0)))
    )
    for step in range(1, 40):
        quiet = {"loss": 2.0 + 0.01 * math.sin(step), "grad_norm": 1.0 + 0.1 * math.cos(step)}
        assert watched.see(step, quiet, squares) == quiet | {"skipped": 0}
    watched.see(40, {"loss": loss, "grad_norm": norm}, squares)
    found = events(tmp_path) if (tmp_path / "events.jsonl").exists() else []
    assert [(one["step"], one["event"], one["samples"]) for one in found] == (
        [(40, event, ["batch 39"])] if event else []
    )
    if found:
        assert sum(found[0]["largest"].values()) <= 1.0 and f"step 40: {event}" in caplog.text
