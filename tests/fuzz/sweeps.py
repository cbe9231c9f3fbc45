"""Sweeps: files of axes that contradict each other, and the folder of a sweep, damaged.

What is accepted has runs with names that lie in its folder, each of which train.py takes as its command says;
a report of a damaged folder is made, or the file that is wrong is named.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybridlm import config as configs
from launch import grid, plan, results, state
from tests import tiny
from tests.fuzz.changes import VALUES, in_bytes, in_file

FIELDS: dict[str, tuple[Any, ...]] = {  # the first two of each can be
    "seed": (0, 1, 2, -1, "x"), "learning_rate": (1e-3, 0.1, -1, "nan"), "mixer": ("retnet", "full", "x", ""),
    "ratio": ("pure", "1:1", "full", "3:1", "0:1", "x", 3), "placement": ("last", "first", "0,1", "9", ""),
    "train.steps": (2, 3, 0, 1 << 40), "model.mlp_hidden": (8, 16, 0), "optimizer.groups": ("*=0.5", "*=1"),
}  # fmt: skip
ODD: dict[str, tuple[Any, ...]] = {
    "model.pattern": ("retnet", "full*2", "("), "model.num_layers": (2, 4, 0, -1), "data.kind": ("mqar", "x"),
    "nobody": (1, 2), "mixers.retnet.head_dim": (8, 16, 7), "a/b": (1, 2), "full": ("full", "retnet"),
    "model.d_model": (16, 32, 0), "{x}": (1, 2), "x": ("1", "a/b"), "": (1, 2), "optimizer.groups": ("=",),
}  # fmt: skip
SIZES = {"small": {"model.d_model": 16}, "odd": {"model.d_model": 16, "nobody.x": 1}, "none": {}}
TEXTS = ("import os\n", "def get_sweep():\n    return 3\n", "x = (\n", "\0", "get_sweep = 3\n",
         "raise SystemExit(3)\n", "def get_sweep(arg):\n    return arg\n",
         "def get_config():\n    return None\n", "1/0\n")  # fmt: skip


class Cases:
    def __init__(self, folder: Path):
        self.folder = folder
        text = tiny.write_text(folder)
        config = configs.resolve(tiny.config(text, model__pattern="retnet full"))
        values = config.to_dict()
        values["mixers"] = tiny.config(text).mixers.to_dict()
        self.base = folder / "base.json"
        self.base.write_text(json.dumps(values))
        self.whole = folder / "whole"
        axes = [grid.axis("seed", 1, 2), grid.axis("ratio", "pure", "1:1", "full")]
        sweep = grid.Sweep(str(self.base), axes, {"mixer": "retnet"})
        runs = grid.runs(sweep, {"train.steps": "3"})
        plan.write(runs, self.whole, {"command": "x"})
        for run in runs:
            lines = [{"step": step, "loss": 3.0 / step, "val_loss": 2.0, "tokens_per_second": 5.0}
                     for step in (1, 2, 3)]  # fmt: skip
            here = self.whole / run.name
            (here / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            starts = {"starts": [{"device": "cpu", "commit": "x", "date": "2026", "sharing": 1}]}
            (here / state.MACHINE).write_text(json.dumps(starts))
            (here / "checkpoints" / "3").mkdir(parents=True)
            (here / "checkpoints" / "3" / "a").touch()
            (here / "checkpoints" / "3" / "SHA256SUMS").write_text("0" * 64 + "  a\n")
        assert {one.state for one in results.read(self.whole)[1]} == {"finished"}

    def __call__(self, chance: random.Random) -> str:
        return chance.choice((self.axes, self.axes, self.files, self.text))(chance)

    def axes(self, chance: random.Random) -> str:
        """A Sweep of random axes, fields and points."""
        known = FIELDS if chance.random() < 0.6 else {**FIELDS, **ODD}
        names = chance.sample(list(known), chance.randint(1, 3))
        few = chance.random() < 0.7
        pick = lambda name: known[name][:2] if few else known[name][: chance.randint(0, 9)]
        axes = [grid.axis(name, *pick(name)) for name in names]
        if chance.random() < 0.2:
            axes.append(grid.axis("size", **dict(chance.sample(list(SIZES.items()), chance.randint(1, 2)))))
        if chance.random() < 0.2 and len(axes) > 1:
            axes = [grid.zipped(*axes[:2]), *axes[2:]]
        one = lambda: {name: chance.choice(known[name]) for name in chance.sample(list(known), 1)}
        sweep = grid.Sweep(
            str(self.base) + chance.choice(("",) * 9 + (":{x}", ":{mixer}", "x")),
            axes,
            {"mixer": "retnet"} if "mixer" not in names else one() if chance.random() < 0.3 else {},
            [one()] if chance.random() < 0.2 else (),
            chance.choice((None, None, lambda point: point.get("seed") != 1)),
            chance.choice(("",) * 6 + ("parameters", "x")),
            chance.choice((0,) * 9 + (1000, -1, float("nan"), 1e30)),
        )
        overrides = {name: str(value) for name, value in one().items()} if chance.random() < 0.1 else {}
        runs = grid.runs(sweep, overrides)
        assert len({run.name for run in runs}) == len(runs) > 0
        for run in runs:
            assert (self.folder / run.name).parent == self.folder and run.name not in ("", ".", "..")
            again = configs.resolve(configs.load(run.spec, run.overrides))
            assert again == run.config
        return "axes accepted"

    def files(self, chance: random.Random) -> str:
        """A sweep's folder with one or two damaged files, reported and continued."""
        here = self.folder / "case"
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(self.whole, here)
        files = [path for path in here.rglob("*") if path.is_file()]
        for _ in range(chance.randint(1, 2)):
            path = here / "sweep.json" if chance.random() < 0.5 else chance.choice(files)
            content = path.read_bytes()
            if path.suffix == ".jsonl" and chance.random() < 0.7:
                line = json.dumps(chance.choice([*VALUES, {"step": 3, "val_loss": chance.choice(VALUES)}]))
                path.write_bytes(content + line.encode() + b"\n")
            else:
                path.write_bytes(in_file(content, chance))
        if chance.random() < 0.5:
            run = chance.choice([one for one in here.iterdir() if one.is_dir()])
            assert state.status(run, 3).state in ("finished", "queued", "failed", "running")
            configs.resolve(configs.load(str(run / state.POINT)))
            return "point read"
        found = results.read(here)[1]
        for metric in results.BOUNDS:
            measured = results.means(found, metric)
            results.by_mixer(measured)
            results.under_budgets(measured, metric)
        assert results.table(found).count("\n") > len(found)
        return "report made"

    def text(self, chance: random.Random) -> str:
        """A sweep file that is none."""
        path = self.folder / "sweep.py"
        text = chance.choice(TEXTS).encode()
        path.write_bytes(in_bytes(text, chance) if chance.random() < 0.5 else text)
        grid.runs(grid.load(f"{path}{chance.choice(('', ':x', ':'))}"))
        return "sweep file accepted"


def cases(folder: Path) -> Callable[[random.Random], str]:
    return Cases(folder)
