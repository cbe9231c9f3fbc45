"""The average of the weights (optimizer.ema) against NumPy's, and every way that it comes out of a run."""

import json
import shutil

import jax
import numpy as np
import pytest

from eval import __main__ as evaluate
from eval import subject
from hybridlm import config as configs
from hybridlm import init_from, model, trainer, weights
from hybridlm.convert import outgoing
from hybridlm.errors import ConfigError
from tests import tiny

DECAY, STEPS = 0.7, 4


def resolved(text, **fields):
    every = {"train__steps": STEPS, "eval__every_steps": 2, "checkpoint__every_steps": 1}
    keep = {
        "checkpoint__keep_last": STEPS,
        "model__pattern": "retnet",
        "optimizer__freeze": ("layers.0.mlp.*",),
    }
    return configs.resolve(tiny.config(text, **(every | keep | {"optimizer__ema": DECAY} | fields)))


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    trainer.train(resolved(text), workdir)
    return workdir


def by_name(workdir, step=STEPS, ema=False):
    found = weights.load(workdir, step, ema)
    return {n: np.asarray(leaf) for n, leaf in model.unstack(found.definition, found.params).items()}


def test_it_is_numpys(run):
    """From zero and divided by 1 - decay^t, in float64, over the weights that each checkpoint has."""
    expected = {name: np.zeros(leaf.shape) for name, leaf in by_name(run).items()}
    for step in range(1, STEPS + 1):
        now = by_name(run, step)
        expected = {name: DECAY * mean + (1 - DECAY) * now[name] for name, mean in expected.items()}
        for name, leaf in by_name(run, step, ema=True).items():
            mean = expected[name] / (1 - DECAY**step)
            np.testing.assert_allclose(leaf, mean, rtol=1e-5, atol=1e-7, err_msg=name)
            if ".mlp." in name:  # frozen: there is none of it, and it is what it is
                np.testing.assert_array_equal(leaf, now[name])


@pytest.mark.once
def test_it_is_validated_beside_the_weights(text, run, tmp_path):
    """A run that starts from it and learns nothing has its loss, and has no average of its own."""
    last = tiny.lines(run)[-1]
    assert last["ema/val_loss"] != last["val_loss"] and last["ema/val_bpb"] != last["val_bpb"]
    stands = {"train__steps": 1, "optimizer__learning_rate": 0.0, "optimizer__ema": 0.0}
    still = configs.resolve(tiny.config(text, model__pattern="retnet", **stands)).replace(
        init_from=f"{run}:ema"
    )
    trainer.train(still, tmp_path)
    [line] = tiny.lines(tmp_path)
    assert line["val_loss"] == pytest.approx(last["ema/val_loss"], rel=1e-6)
    assert not any("ema" in name for name in line)
    scores = [subject.load(*asked, ema=ema).log_likelihoods([([1, 2], [3, 4])])
              for asked, ema in (((tmp_path,), False), ((run,), True), ((run,), False))]  # fmt: skip
    assert scores[0] == scores[1] != scores[2]
    assert not (tmp_path / "checkpoints" / "1" / "ema").exists()
    for ask in (
        lambda: weights.load(tmp_path, ema=True),
        lambda: outgoing.export_hf(tmp_path, tmp_path / "hf", ema=True),
        lambda: init_from.described(f"{tmp_path}:ema"),
    ):
        with pytest.raises(ConfigError, match=r"kept no average of its weights\. Train with"):
            ask()
    with pytest.raises(ConfigError, match="is the average of no run"):
        init_from.described(f"{tmp_path}/none:ema")


@pytest.mark.once
def test_a_resumed_run_is_the_same(text, run, tmp_path):
    again = shutil.copytree(run, tmp_path / "again")
    for step in range(2, STEPS + 1):
        shutil.rmtree(again / "checkpoints" / str(step))
    trainer.train(resolved(text), again, resume="must")
    assert tiny.lines(again) == tiny.lines(run)
    jax.tree.map(np.testing.assert_array_equal, by_name(again, ema=True), by_name(run, ema=True))
    with pytest.raises(ConfigError, match=r"a resumed run cannot change it.* optimizer.ema: 0.7 -> 0.9"):
        trainer.train(resolved(text, optimizer__ema=0.9), again)


@pytest.mark.once
def test_it_is_evaluated_beside_the_weights(run, capsys):
    command = lambda *flags: evaluate.main([f"--workdir={run}", "--tasks=parity", "--lengths=16", *flags])
    assert command("--samples=2", "--ema") == command("--samples=3") == 0
    kept = [json.loads((run / folder / "eval.json").read_text()) for folder in ("ema", ".")]
    assert [one["results"]["parity@16"]["samples"] for one in kept] == [2, 3]
    assert (run / "ema" / "eval.png").is_file()
    assert "average of the weights" in capsys.readouterr().out


def test_it_is_exported(run, tmp_path):
    for ema in (False, True):
        outgoing.export_hf(run, tmp_path / str(ema), ema=ema)
        with init_from.source(tmp_path / str(ema)) as source:
            expected = by_name(run, ema=ema)
            assert source.arrays.keys() == expected.keys()
            for name, leaf in expected.items():
                np.testing.assert_array_equal(np.asarray(source.arrays[name]), leaf, err_msg=name)
