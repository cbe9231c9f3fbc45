"""Checkpoints of hybridlm 0.1.0: what that version wrote (golden/run-0.1.0.tar.xz), upgraded and resumed.

The run has eleven layers of `kda*3 full`, which 0.1.0 stacked as three periods with one absent layer, AdamW,
train.z_loss, and a checkpoint at step 4; its metrics.jsonl goes on to step 8. Written by commit dbe2e32 with
jax 0.10.2 on a CPU.
"""

import shutil
import tarfile
from pathlib import Path

import pytest

from hybridlm import config as configs
from hybridlm import model, trainer, weights
from hybridlm.convert import __main__ as command
from hybridlm.convert import upgrade
from hybridlm.errors import ConfigError
from hybridlm.run import checkpoint, logbook, seal

GOLDEN = Path(__file__).parent / "golden" / "run-0.1.0.tar.xz"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


@pytest.mark.slow
def test_an_upgraded_run_goes_on_as_it_would_have(old: Path) -> None:
    want = logbook.read(old / "metrics.jsonl")
    with pytest.raises(ConfigError, match=r"hybridlm\.convert upgrade --workdir="):
        trainer.train(configs.of_run(old), old)
    assert command.main(["upgrade", f"--workdir={old}"]) == 0
    assert (old / "checkpoints-0.1.0" / "4").is_dir() and not seal.damage(old / "checkpoints" / "4")
    config = configs.of_run(old)
    trainer.train(config, old)
    got = logbook.read(old / "metrics.jsonl")
    assert [line["step"] for line in got] == list(range(1, 9))
    for before, after in zip(want[4:], got[4:], strict=True):
        for name, rel in (("loss", 1e-5), ("grad_norm", 1e-3), ("learning_rate", 1e-6)):  # one norm is 64
            assert after[name] == pytest.approx(before[name], rel=rel), (before["step"], name)


@pytest.mark.once
def test_a_killed_upgrade_goes_on(old: Path) -> None:
    """Killed while it wrote, and between its two renames; then there is nothing more to do."""
    (old / upgrade.WRITING / "4").mkdir(parents=True)
    assert upgrade.upgrade(old) == [4]
    step, names = weights.load(old).step, set(weights.load(old).params)
    (old / "checkpoints").rename(old / upgrade.WHOLE)
    assert upgrade.upgrade(old) == [4] and (old / upgrade.OLD / "4").is_dir()
    assert weights.load(old).step == step == 4 and set(weights.load(old).params) == names
    with pytest.raises(ConfigError, match="was upgraded before"):
        upgrade.upgrade(old)
    shutil.rmtree(old / upgrade.OLD)
    with pytest.raises(ConfigError, match=r"holds no checkpoints of hybridlm 0\.1\.0"):
        upgrade.upgrade(old)


@pytest.mark.once
def test_every_array_is_there_and_no_other(old: Path) -> None:
    upgrade.upgrade(old)
    definition = model.build(configs.of_run(old))
    with checkpoint.Checkpoints(old / "checkpoints") as saves:
        assert saves.record(4)["format"] == checkpoint.FORMAT
        params = saves.open(4, "params", model.canonical_shapes(definition))
        # layer 9 is the second of the last period, whose fourth is absent
        assert params["layers.9.mixer.q_proj.kernel"].shape == (4, 4)


@pytest.mark.parametrize(
    ("layers", "places"),
    [
        (["a"] * 3, [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2)]),
        (["a", "b"] * 2, [(0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 1, 0)]),
        # one of fifteen places absent; then a tail of its own, since two of sixteen would be too many
        (
            [*"aab" * 4, *"aa"],
            [(0, 0, i, j) if j < 2 else (0, 1, i, 0) for i in range(4) for j in range(3)]
            + [(0, 0, 4, 0), (0, 0, 4, 1)],
        ),
        (
            [*"aaab" * 3, *"aa"],
            [(0, 0, i, j) if j < 3 else (0, 1, i, 0) for i in range(3) for j in range(4)]
            + [(1, 0, 0, 0), (1, 0, 0, 1)],
        ),
    ],
)
def test_places_of_0_1_0(layers: list[str], places: list[tuple[int, ...]]) -> None:
    assert [tuple(place) for place in upgrade.places(layers)] == places
