"""What a student lends its teacher: held once, and every number as with a teacher that has all its own."""

import jax
import numpy as np
import pytest

from hybridlm import (
    ahead,
    init_from,
    lent,
    member,
    model,
    plan,
    program,
    report,
    schema,
    sharding,
    stages,
    trainer,
)
from hybridlm import config as configs
from hybridlm.errors import ConfigError
from tests import tiny

FROZEN = ("embedding", "final_norm*", "layers.*.m*_norm*", "layers.*.mlp.*", "layers.1.*")


@pytest.fixture(scope="module")
def teacher(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher")
    trainer.train(configs.resolve(tiny.config(text, model__pattern="full*4", train__steps=1)), workdir)
    return workdir


def student(text, teacher, frozen=FROZEN, **fields):
    c = tiny.config(text, model__pattern="(retnet full)*2", model__dtype="bfloat16", **fields)
    c.init_from = str(teacher)
    c.objective = configs.objective("distil", teacher=str(teacher), kl=1.0, hidden=0.5, transfer=1.0)
    c.optimizer.freeze = frozen
    return c


def trained(config, names):
    """(three steps' losses, parameters after them, a validation's sums, bytes of a step's arguments, what the
    teacher has of its own)."""
    definition, mesh = model.build(config), sharding.make_mesh(schema.Mesh(data=1))
    source = member.build_data(config, "train")
    with jax.set_mesh(mesh):
        built = program.build(config, definition, mesh, None, lent=names)
        theirs = init_from.teacher(config, built)
        state = built.init(jax.random.key(0))
        with init_from.source(config.init_from) as other:
            state["params"], _ = init_from.load(other, definition, state["params"])
        put = lambda index: sharding.put_batch(source.batch(index), mesh)
        compiled = built.step.lower(state, put(0), *theirs).compile()
        losses = []
        for index in range(3):
            state, metrics = compiled(state, put(index), *theirs)
            losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        sums = jax.device_get(built.evaluate(state["params"], put(0), *theirs))
    argument_bytes = compiled.memory_analysis().argument_size_in_bytes
    return losses, jax.device_get(state["params"]), sums, argument_bytes, theirs[0]


@pytest.mark.once
@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_numbers_in_less_memory(text, teacher, microbatches):
    """Against the same steps with a teacher that borrows nothing, in the sizes that the names make."""
    config = configs.resolve(student(text, teacher, train__microbatches=microbatches))
    names = lent.names([config])
    alone, shared = trained(config, frozenset()), trained(config, names)
    for apart, together in zip(alone[:3], shared[:3], strict=True):
        jax.tree.map(np.testing.assert_array_equal, apart, together)
    borrowed = set(alone[4]) - set(shared[4])
    assert alone[3] - shared[3] == sum(alone[4][name].nbytes for name in borrowed)
    own = {f"segments.0.{run}.mixer.{name}_proj.kernel" for run in (0, 2, 3) for name in "qkvo"}
    assert shared[4].keys() == {"head"} | own and len(borrowed) > len(own)


def test_only_what_came_from_the_teacher_and_was_never_trained(text, teacher, tmp_path, monkeypatch):
    """Names by stage: what an earlier stage trained, another source brought or a rule made is not lent."""
    config = student(text, teacher, ())
    config.stages = {
        "order": ("first", "second", "third"),
        "first": {"train": {"steps": 1}, "optimizer": {"freeze": ("embedding", "layers.*.mlp.*")}},
        "second": {"train": {"steps": 1}, "optimizer": {"freeze": ("*", "!layers.0.m*", "!head")}},
        "third": {"train": {"steps": 1}, "objective": {"kind": "next_token"}},
    }
    parts = [one for _, one in stages.split(configs.resolve(config), configs.resolve)]
    mlp = lambda layer: {f"layers.{layer}.mlp.{name}.kernel" for name in ("gate", "up", "down")}
    assert lent.names(parts[:1]) == {"embedding"} | mlp(0) | mlp(1) | mlp(2) | mlp(3)
    assert lent.names(parts[:2]) == {"embedding"} | mlp(1) | mlp(2) | mlp(3)
    assert not lent.names(parts)
    asked = []
    monkeypatch.setattr(
        ahead, "needs", lambda *given: asked.append(given) or ahead.Needs("full", 1, 2, {}, 0)
    )
    said = report.compiled(configs.resolve(config), "h100:1")
    assert [names for _, _, names in asked] == [lent.names(parts[:n]) for n in (1, 2, 3)]
    assert [one.train.steps for one, _, _ in asked] == [1, 2, 3] and len(said) == 6
    config.stages = {}
    config.optimizer.freeze = FROZEN
    one = configs.resolve(config)
    names, definition = lent.names([one]), model.build(one)
    kept = {name for name in names if ".mixer." in name}
    assert kept and all(name.startswith("layers.1.") for name in kept)
    fresh = jax.jit(lambda key: model.init(definition, key))(jax.random.key(3))
    with init_from.source(teacher) as other:
        theirs, _ = init_from.load(other, definition, fresh)
    lent.check(names, str(teacher), definition, theirs)
    with pytest.raises(ConfigError, match="which never trained it"):
        lent.check(names, str(teacher), definition, theirs | {"embedding": fresh["embedding"]})
    config.init_from = str(tmp_path)
    assert not lent.names([configs.resolve(config)])


@pytest.mark.slow
def test_a_run_that_began_with_another_teacher_is_refused(text, teacher, tmp_path):
    """It resumes with its own, and is told apart from one of other values of what it never trained."""
    other = tmp_path / "other"
    trainer.train(configs.resolve(tiny.config(text, model__pattern="full*4", train__steps=2)), other)
    trainer.train(configs.resolve(student(text, teacher, train__steps=1)), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"objective.teacher.*other values of 'embedding'"):
        trainer.train(configs.resolve(student(text, other, train__steps=2)), tmp_path / "run")
    trainer.train(configs.resolve(student(text, teacher, train__steps=2)), tmp_path / "run")


def test_a_plan_like_another():
    layout = plan.plan("aababb")
    found = plan.like(layout, "ccdcdd")
    assert found.items() == tuple("ccdcdd") and str(found) == str(layout).replace("a", "c").replace("b", "d")
    assert plan.like(layout, "cccccc").indices()[0][0].tolist() == layout.indices()[0][0].tolist()
    assert plan.like(layout, "abcdef") == plan.plan("abcdef") and plan.like(layout, "aa") == plan.plan("aa")


@pytest.mark.slow
def test_a_run_of_stages_writes_the_same_lines(text, teacher, tmp_path, monkeypatch):
    """Lent in the first stage, less in the second, validations between them."""
    config = student(text, teacher, (), eval__every_steps=1)
    config.stages = {
        "order": ("first", "second"),
        "first": {"train": {"steps": 2}, "optimizer": {"freeze": FROZEN}},
        "second": {"train": {"steps": 2}, "optimizer": {"freeze": ("embedding",)}},
    }
    trainer.train(configs.resolve(config), tmp_path / "lent")
    monkeypatch.setattr(lent, "names", lambda parts: frozenset())
    trainer.train(configs.resolve(config), tmp_path / "apart")
    assert tiny.lines(tmp_path / "lent") == tiny.lines(tmp_path / "apart")
