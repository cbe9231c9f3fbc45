"""Settings that nothing reads are told from those that something does."""

import itertools

import pytest

from hybridlm import config as configs
from hybridlm import idle


@pytest.mark.parametrize("best_metric", ["val_loss", "loss"])
def test_checkpoints_that_are_not_measured_are_said(best_metric):
    """Against the steps themselves, for pairs of intervals in a run of 12 steps."""
    section = "eval" if best_metric == "val_loss" else "log"
    for saved, measured in itertools.product((0, 1, 2, 3, 5, 12, 13), (1, 2, 3, 4, 12, 13)):
        given = configs.default()
        given.train.steps, given.data.path = 12, "x"
        given.checkpoint.update(every_steps=saved, best_metric=best_metric)
        given[section].every_steps = measured
        at = lambda every: {step for step in range(1, 13) if step == 12 or (every and step % every == 0)}
        said = idle.ranking(configs.resolve(given))
        assert bool(said) == bool(at(saved) - at(measured))
        if said:
            regular = sorted(at(saved) & at(measured) - {12})
            assert f"every {regular[0]} steps" in said if regular else "after the last step" in said


def test_fields_that_nothing_reads_are_said() -> None:
    """Each with the field beside it that decides, in both of its states."""
    mixed = {"data.kind": "mixture", "data.components.a.kind": "text", "data.components.a.path": "x"}
    cases = (
        ("optimizer.muon_momentum", {"optimizer.name": "adamw"}, {"optimizer.name": "muon"}),
        ("optimizer.decay_fraction", {"optimizer.schedule": "cosine"}, {"optimizer.schedule": "wsd"}),
        ("optimizer.final_ratio", {"optimizer.schedule": "constant"}, {"optimizer.schedule": "wsd"}),
        ("eval.task_samples", {}, {"eval.tasks": "parity"}),
        ("eval.temperature", {"eval.sample_tokens": "0"}, {"eval.sample_tokens": "1"}),
        ("checkpoint.best_metric", {"checkpoint.keep_best": "0"}, {}),
        ("data.holdout", {"data.val_path": "y"}, {}),
        ("val.one.holdout", {"val.one.kind": "text", "val.one.val_path": "y"}, {}),
        ("data.weight", {}, None),
        ("data.components.a.weight", None, mixed),
        ("data.num_pairs", {"data.kind": "mqar", "data.slices": "(64, 4)"}, {"data.kind": "mqar"}),
    )
    for field, unread, heeded in cases:
        for changes, said in ((unread, True), (heeded, False)):
            if changes is None:
                continue
            config = configs.resolve(configs.load("configs/quickstart.py", changes))
            assert bool(idle.override(config, field)) == said, (field, changes)
