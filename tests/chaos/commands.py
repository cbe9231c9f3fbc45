"""Kills in the other commands, on the run of a trial: the same command goes on, and the run is as before."""

import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from hybridlm import untrusted, weights
from hybridlm.run import seal, sound
from tests import tiny
from tests.chaos.strike import MARK
from tests.chaos.trial import SECONDS, Trial, finish

SWEEP = """
from launch.grid import Sweep, axis
def get_sweep():
    fields = {{"train.steps": 8, "checkpoint.every_steps": 2, "eval.every_steps": 0}}
    return Sweep("{base}", [axis("seed", 1, 2)], fields)
"""


CHANGES = {"export": 8, "import": 40, "eval": 12}  # that a command makes of its folder, about


def killed(trial: Trial, chance: random.Random, name: str, *words: str) -> None:
    """The command ``words`` killed, mostly at a change that it makes; then again, to its end."""
    for _ in range(chance.randint(1, 3)):
        if chance.random() < 0.2:
            process = trial.command(*words)
            began, wait = time.monotonic(), chance.uniform(1, 12)
            while process.poll() is None and time.monotonic() < began + wait:
                time.sleep(0.01)
            process.kill()
            where = "at some time, before it ended" if finish(process) else "after it ended"
        else:
            number, seconds = chance.randint(1, CHANGES[name]), chance.choice((0, 0, 0, 0.1))
            strike = (str(number), str(seconds), str(trial.folder), *words)
            finish(trial.command("tests.chaos.strike", *strike))
            found = MARK.search(trial.said())
            where = found[1] if found else "after its last change"
        trial.corpus.moments[name][where] += 1
    code = finish(trial.command(*words))
    done = code == 2 and re.search("must be a new or empty|already holds", trial.said())  # before the kill
    assert code == 0 or done, f"{' '.join(words[:3])} again: exit code {code}"


def trained(trial: Trial) -> bool:
    """A run with checkpoints, stopped in the middle, whose newest no earlier fault of the trial has harmed.

    The commands refuse a harmed one by its name; a start of training puts it right.
    """
    harmed = lambda newest: seal.damage(newest) or sound.misnamed(newest)
    if (newest := trial.newest()) is None or harmed(newest):
        process, before = trial.start(), trial.lines()
        while (trial.newest() is None or trial.lines() == before) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        finish(process)
    return trial.newest() is not None


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def convert(trial: Trial, chance: random.Random, which: str) -> bool:
    """A kill in the export of the run, or in the import of what was exported."""
    if not trained(trial):
        return False
    hf, run = (trial.folder / f"{name} $x-{trial.starts}" for name in ("hf", "imported"))
    out = ("hybridlm.convert", "export", f"--workdir={trial.workdir}")
    back = ("hybridlm.convert", "import", f"--hf={hf}", f"--workdir={run}")
    if which == "export":
        killed(trial, chance, "export", *out, f"--hf={hf}")
        whole = hf.with_name(f"whole-{trial.starts}")
        assert finish(trial.command(*out, f"--hf={whole}")) == 0, "export"
        assert files(hf) == files(whole), "the export after a kill differs"
        return False
    assert finish(trial.command(*out, f"--hf={hf}")) == 0, "export"
    killed(trial, chance, "import", *back)
    ours, theirs = (weights.load(folder).params for folder in (trial.workdir, run))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs)), "the import after a kill differs"
    return False


def evaluation(trial: Trial, chance: random.Random) -> bool:
    """A kill in eval, whose numbers are then those of one that went through."""
    if not trained(trial):
        return False
    result, found = trial.workdir / "eval.json", []
    words = ("eval", f"--workdir={trial.workdir}", "--tasks=parity,mqar_4", "--lengths=16,32", "--samples=8")
    for run in (lambda: killed(trial, chance, "eval", *words), lambda: finish(trial.command(*words))):
        result.unlink(missing_ok=True)
        run()
        measured = untrusted.read_json(result, "eval.json")["results"].items()
        found.append({name: {**one, "seconds": 0} for name, one in measured})
    assert found[0] == found[1] and found[0], "eval after a kill differs"
    return False


def sweep(trial: Trial, chance: random.Random) -> bool:
    """A kill in a sweep and damaged files; then the same command, and runs like those of one untouched."""
    file = trial.folder / "sweep.py"
    file.write_text(SWEEP.format(base=trial.corpus.configs[trial.kind]))
    whole, broken = (trial.folder / f"{name} $x-{trial.starts}" for name in ("whole", "sweep"))
    words = ("launch.sweep", f"--config={file}", "--engine=jobs=1")
    process = trial.command(*words, f"--workdir={broken}")
    wanted = chance.randint(0, 7)  # of the 8 of both runs
    lines = lambda: sum(path.read_bytes().count(b"\n") for path in broken.glob("*/metrics.jsonl"))
    began = time.monotonic()
    while lines() < wanted and process.poll() is None and time.monotonic() < began + SECONDS:
        time.sleep(0.01)
    process.kill()
    finish(process)
    harm = chance.choice((b"", b"\0" * 30, b"{\xff"))
    for path in [*broken.glob("sweep.json"), *broken.glob("*/*.json"), *broken.glob("results.*")]:
        if chance.random() < 0.7:
            path.write_bytes(harm)
    for folder in (broken, whole):
        code = finish(trial.command(*words, f"--workdir={folder}"))
        assert code == 0, f"the sweep in {folder.name}: exit code {code}"
    ends = [[tiny.lines(path) for path in sorted(folder.glob("*seed*"))] for folder in (broken, whole)]
    assert ends[0] == ends[1] and len(ends[0]) == 2, "the sweep after a kill differs"
    return False


FAULTS: dict[str, Callable[[Trial, random.Random], bool]] = {
    "killed in export": lambda trial, chance: convert(trial, chance, "export"),
    "killed in import": lambda trial, chance: convert(trial, chance, "import"),
    "killed in eval": evaluation,
    "killed in a sweep, files damaged": sweep,
}
