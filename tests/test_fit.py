"""What the backward pass keeps changes no result; `auto` takes the fastest choice that fits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hybridlm import config as configs
from hybridlm import fit, model, opening, program, remat, report, sharding, trainer
from hybridlm.errors import ConfigError, RunError

GIB = 2**30


@pytest.fixture(scope="module")
def run():
    """(resolved config with remat=auto, its definition, mesh, a batch)."""
    config = configs.resolve(tiny.config("unused", model__remat="auto", model__pattern="retnet*2 full"))
    mesh = sharding.make_mesh(config.mesh)
    shape = (config.train.batch_size, config.train.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "positions": positions}
    return config, model.build(config), mesh, batch | {"segment_ids": np.ones(shape, np.int32)}


@pytest.mark.once
def test_every_choice_has_the_same_step(run):
    """Loss and parameters after a step, against those of keeping everything."""
    config, definition, mesh, batch = run
    found = {}
    for policy in remat.POLICIES:
        settings = dataclasses.replace(definition.model, remat=policy)
        one = dataclasses.replace(definition, model=settings)
        with jax.set_mesh(mesh):
            made = program.build(config, one, mesh, None)
            state, metrics = made.step(made.init(jax.random.key(0)), sharding.put_batch(batch, mesh))
        found[policy] = metrics["loss"], state["params"]
    for policy in found:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found[policy], found["none"]
        )


@jax.custom_vjp
def kernel(x):
    return jnp.cosh(x)


# As the recurrences' kernels are: under rematerialisation the first pass keeps nothing.
kernel.defvjp(lambda x: (jnp.cosh(x), jnp.sinh(x)), lambda sinh, g: (g * sinh,), optimize_remat=True)


def test_what_is_dear_is_kept():
    """Products, and what a kernel with a gradient of its own keeps: how often they are computed."""

    def count(jaxpr, name):
        inner = [getattr(v, "jaxpr", v) for e in jaxpr.eqns for v in e.params.values()]
        here = sum(e.primitive.name == name for e in jaxpr.eqns)
        return here + sum(count(j, name) for j in inner if hasattr(j, "eqns"))

    def layer(x, w):
        return jnp.sum(kernel(jnp.sin(x @ w)) @ w)

    found = {}
    for policy in ("none", "kernels", "dots", "full"):
        run = layer if policy == "none" else jax.checkpoint(layer, policy=remat.POLICIES[policy])
        jaxpr = jax.make_jaxpr(jax.grad(run, (0, 1)))(jnp.ones((4, 4)), jnp.ones((4, 4))).jaxpr
        found[policy] = count(jaxpr, "dot_general"), count(jaxpr, "cosh")
    assert found == {"none": (6, 1), "kernels": (6, 1), "dots": (6, 2), "full": (7, 2)}


def test_what_a_step_holds():
    """Three layers of a product of 64 bytes each: only these are kept beside the layers' inputs; a step whose
    shapes say that it is too large is not compiled."""
    w = jnp.ones((4, 4))

    def traced(policy, micro):
        def loss(w, x):
            for _ in range(3):
                x = jax.checkpoint(lambda x, w: jnp.sin(x @ w), policy=remat.POLICIES[policy])(x, w)
            return jnp.sum(x**2)

        gradient = jax.grad(loss)
        if micro:
            add = lambda total, x: (total + gradient(w, x), None)
            return jax.jit(lambda w, x: jax.lax.scan(add, w, jnp.stack([x, x]))[0]).trace(w, w)
        return jax.jit(gradient).trace(w, w)

    for micro in (False, True):
        kept, nothing = (fit.held(traced(policy, micro).jaxpr.jaxpr) for policy in ("dots", "full"))
        assert kept - nothing == 3 * 64 and nothing > 2 * 64
    too_large = fit.compiled(traced("dots", False), 3 * 64)
    assert too_large.run is None and too_large.needs > 5 * 64
    assert fit.compiled(traced("dots", False), GIB).needs >= 2 * 64


@pytest.mark.parametrize(
    ("needs", "chosen", "compiled"),
    [
        ((9, 8, 5, 4, 2, 1), "most", 1),
        ((11, 5, 3, 3, 2, 1), "kernels", 2),
        ((None, 5, 3, 3, 2, 1), "kernels", 2),
        ((11, 10, 5, 4, 2, 1), "dots", 3),
        ((11, 11, 11, 6, 5, 1), "mixer", 4),
        ((11, 11, 11, 11, 5, 1), "attention", 5),
        ((11, 11, 11, 11, 10, 1), "full", 6),
        ((11, 11, 11, 11, 11, 11), "full", 6),
        ((-11, 5, 3, 3, 2, 1), "kernels", 2),
    ],
)
def test_the_fastest_that_fits(needs, chosen, compiled):
    """Of 10 GiB, which 10 GiB do not fit in: the allocator loses some. None: the compiler runs out; below 0:
    known to be too large without compiling."""
    asked = []

    def step(policy):
        asked.append(policy)
        size = needs[fit.FASTEST_FIRST.index(policy)]
        if size is None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return fit.Step(policy if size > 0 else None, abs(size) * GIB)

    policy, found, said = fit.choose(step, 10 * GIB)
    assert (policy, found.run, len(asked)) == (chosen, chosen, compiled)
    first = f"most {needs[0]}.0 GiB" if needs[0] else "most more than there is"
    first = first.replace("-", "at least ")
    assert said.startswith(f"{chosen}; of 10.0 GiB a device {first}")


def traced(run, seen):
    """What `fit.step` compiles, and the state that it starts from."""
    config, definition, mesh, batch = run
    state = program.build(config, definition, mesh, None).init(jax.random.key(0))

    def trace(one):
        seen.append((one.model.remat, one.model.scan))
        return program.build(config, one, mesh, None).step.trace(state, sharding.put_batch(batch, mesh))

    return trace, state, sharding.put_batch(batch, mesh)


def test_devices_that_say_their_memory(run, monkeypatch, tmp_path):
    """The first choice fits and runs; the next start finds it, unless the note is damaged."""
    config, definition, mesh, _ = run
    monkeypatch.setattr(fit, "limit", lambda: 8 * GIB)
    monkeypatch.setattr(fit, "_memo", lambda *_: tmp_path / "memo")
    tried = []
    monkeypatch.setattr(fit, "choose", lambda *args, of=fit.choose: tried.append(of(*args)) or tried[-1])
    seen = []
    with jax.set_mesh(mesh):
        trace, state, batch = traced(run, seen)
        _, metrics = fit.step(config, definition, mesh, trace)(state, batch)
        assert np.isfinite(metrics["loss"]) and (tmp_path / "memo").read_text() == "most"
        fit.step(config, definition, mesh, trace)
        assert len(tried) == 1
        (tmp_path / "memo").write_text("damaged")
        fit.step(config, definition, mesh, trace)
    assert len(tried) == 2 and (tmp_path / "memo").read_text() == "most"
    assert seen == [("most", False)] * 3


def test_what_cannot_fit_is_refused_before_it_runs(run, monkeypatch, tmp_path):
    config, definition, mesh, _ = run
    config = config.replace(train__batch_size=12, train__microbatches=2)
    monkeypatch.setattr(fit, "_memo", lambda *_: tmp_path / "memo")
    monkeypatch.setattr(fit, "compiled", lambda traced, most, ready: fit.Step(traced, 3 * GIB))
    trace = lambda one: one.model.remat
    for gib, fix in ((3, None), (1.3, "Set train.microbatches=6 or higher, fewer"), (0.1, "Set fewer or")):
        monkeypatch.setattr(fit, "limit", lambda gib=gib: int(gib * GIB))
        if fix is None:
            assert fit.step(config, definition, mesh, trace) == "full"
            (tmp_path / "memo").unlink()
            continue
        with pytest.raises(RunError, match=rf"needs {3 / gib:.1f} times a device's memory.*{fix}"):
            fit.step(config, definition, mesh, trace)
    assert not (tmp_path / "memo").exists()


@pytest.mark.once
def test_what_ran_out_of_memory_is_not_chosen_again(run, monkeypatch, tmp_path):
    """A step that fitted by its plan and fails in the loop: one line, and the next start takes the next."""
    config, definition, mesh, _ = run
    memo, seen = tmp_path / "memo", []
    memo.write_text("kernels")
    (tmp_path / "text.txt").write_text("a line of text\n" * 500)
    monkeypatch.setattr(fit, "limit", lambda: 8 * GIB)
    monkeypatch.setattr(fit, "_memo", lambda *_: memo)

    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    with monkeypatch.context() as m, pytest.raises(RunError) as failed:
        m.setattr(fit, "step", lambda *args: full)
        trainer.train(config.replace(data__path=str(tmp_path / "text.txt")), tmp_path / "run")
    said = "the devices ran out of memory with what model.remat=auto chose, kernels. The same command"
    assert str(failed.value) == f"{said} goes on with dots, which keeps less."
    with jax.set_mesh(mesh):
        fit.step(config, definition, mesh, traced(run, seen)[0])
    assert seen == [("dots", False)]
    last = "chose, full. Set train.microbatches"
    for then, wanted in (
        ("with mixer", "mixer"), ("with attention", "attention"), ("with full", "full"), (last, "full"),
    ):  # fmt: skip
        with pytest.raises(RunError, match=then), fit.outgrown(lambda: config, mesh):
            full()
        assert memo.read_text().partition("\n")[0] == wanted
    fixed = config.replace(model__remat="full")
    with pytest.raises(jax.errors.JaxRuntimeError), fit.outgrown(lambda: fixed, mesh):
        full()


def test_where_memory_is_unknown_everything_is_kept(run):
    config, definition, mesh, _ = run
    seen = []
    with jax.set_mesh(mesh):
        fit.step(config, definition, mesh, traced(run, seen)[0])
    assert seen == [("none", True)]


@pytest.fixture
def chooses(monkeypatch, tmp_path):
    """(config whose 16 rows are to be split; (config, number) -> bytes that `dots` holds;
    (config, bytes of a device) -> the number that is chosen and how many traces it took)."""
    given = tiny.config("unused", model__remat="auto", model__pattern="retnet")
    given.train.update(batch_size=16, microbatches=0)
    config = configs.resolve(given)
    mesh = sharding.make_mesh(config.mesh)
    row = jax.ShapeDtypeStruct((16, config.train.seq_len), np.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), row)
    traces, known = [], {}

    def trace(config, one):
        traces.append((config.train.microbatches, one.model, one.layers))
        if traces[-1] not in known:
            built = program.build(config, one, mesh, None)
            with jax.set_mesh(mesh):
                known[traces[-1]] = built.step.trace(built.shapes, batch)
        return known[traces[-1]]

    def held(config, number):
        one = fit.settled(model.build(config), "dots")
        return fit.held(trace(config.replace(train__microbatches=number), one).jaxpr.jaxpr)

    def choose(config, available, runs=1):
        traces.clear()
        found = fit.parted(config, model.build(config), mesh, trace, available, runs)
        return found.train.microbatches, len(traces)

    monkeypatch.setattr(fit, "_memo", lambda *key: tmp_path / f"{key[0]}-{key[-2]}-{key[-1]}")
    monkeypatch.setattr(fit, "LEAST_TOKENS", config.train.seq_len)
    return config, held, choose


def test_the_fewest_microbatches_that_fit(chooses, monkeypatch):
    """Of memory that a number of them just needs, that number; found again without a trace."""
    config, held, choose = chooses
    enough = lambda number: int(held(config, number) / fit.SHARE / (1 - fit.OUTSIDE)) + 8
    for number in (1, 4):
        available = enough(number)
        chosen, traces = choose(config, available)
        assert chosen == number and traces <= 5
        assert choose(config, available) == (number, 0)
    assert choose(config, GIB // 2**20)[0] == 16  # what fits in nothing is not made worse
    assert choose(config, None) == (1, 0)
    monkeypatch.setattr(fit, "LEAST_TOKENS", 4 * config.train.seq_len)
    assert choose(config, 2**11)[0] == 4
    assert choose(config, 2**11, runs=2)[0] == 8  # which a device has the tokens of together


def test_choices_are_kept_by_what_they_depend_on(run, monkeypatch, tmp_path):
    config, _, mesh, _ = run
    monkeypatch.setattr(fit.programs, "folder", lambda: tmp_path)
    keys = [("remat", 1, 1), ("remat", 2, 1), ("remat", 1, 2), ("microbatches", 1, 1)]
    kept = {fit._memo(of, config, mesh, available, runs).name for of, available, runs in keys}
    assert len(kept) == 4 and all(name.partition("-")[0] in ("remat", "microbatches") for name in kept)
    assert fit._memo("remat", config, mesh, 1, 1) == fit._memo("remat", config, mesh, 1, 1)


def test_a_loss_of_whole_batches_is_not_split(chooses):
    """Experts' balance is of each microbatch by itself: another number would be another objective."""
    choose = chooses[-1]
    experts = configs.mlp("moe", num_experts=4, top_k=2, hidden=16)
    given = tiny.config("unused", model__remat="auto", model__pattern="retnet/experts full")
    given.mlps = {"experts": experts}
    given.train.update(batch_size=16, microbatches=0)
    assert choose(configs.resolve(given), 2**10)[0] == 1


def test_a_dry_run_says_that_the_batch_may_be_parted(chooses):
    config, one = chooses[0], {"data": 1, "fsdp": 1, "tensor": 1}
    name = "memory per device, estimate"
    found = [report.facts(config.replace(train__microbatches=n), one)[name] for n in (0, 1)]
    assert (
        found[0].removesuffix("; of a whole batch, before train.microbatches=0 is found out)") + ")"
        == found[1]
    )


def test_microbatches_are_chosen_with_auto_only():
    with pytest.raises(
        ConfigError, match=r"train.microbatches = 0: is chosen with model.remat=auto only, which"
    ):
        configs.resolve(tiny.config("unused", model__remat="dots", train__microbatches=0))


@pytest.mark.once
def test_a_run_chooses_its_microbatches(tmp_path, monkeypatch):
    """Trained so, 4 of 2 rows, its losses are those of a run in one; its record says 0 again. What it says
    of its kernels before it begins is of 2 rows."""
    (tmp_path / "text.txt").write_text("a line of text\n" * 500)
    monkeypatch.setattr(fit, "_fewest", lambda *args: 4)
    monkeypatch.setattr(fit, "limit", lambda: 8 * GIB)
    said, explain = [], opening.explain
    look = lambda run, params, batch: said.append(batch["tokens"].shape[0]) or explain(run, params, batch)
    monkeypatch.setattr(opening, "explain", look)
    found = {}
    for number in (0, 1):
        config = tiny.config(str(tmp_path / "text.txt"), model__remat="auto", train__microbatches=number)
        trainer.train(configs.resolve(config), tmp_path / str(number))
        found[number] = [line["loss"] for line in tiny.lines(tmp_path / str(number))]
        assert configs.of_run(tmp_path / str(number)).train.microbatches == number
    assert said == [2, 8]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert found[0] != found[1]  # added up in another order
