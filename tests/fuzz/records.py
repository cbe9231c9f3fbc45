"""What lies in a run's folder, damaged: it goes on from a checkpoint as it was, or says what is wrong.

A small run of three checkpoints is copied; one or two of its files are damaged (records, seals, metrics,
events, config, arrays), also a checkpoint's record under a seal that fits it. Then it is opened as `train.py`
resumes it, as `weights.load` reads it and as a sweep looks at it; parameters are those that were saved.
"""

import contextlib
import copy
import io
import json
import random
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from rich.console import Console

from hybridlm import config as configs
from hybridlm import trainer, weights
from hybridlm.errors import ConfigError, RunError
from hybridlm.member import Member
from hybridlm.run import checkpoint, logbook, seal
from launch import state
from tests import tiny
from tests.fuzz.changes import in_file, in_json

STEPS = (2, 4, 6)


class Cases:
    def __init__(self, folder: Path):
        self.folder, self.run = folder, folder / "run"
        config = tiny.config(tiny.write_text(folder), model__pattern="retnet", optimizer__ema=0.5)
        config.checkpoint.update(every_steps=2, keep_last=9)
        self.config = configs.resolve(config)
        with contextlib.redirect_stdout(io.StringIO()), mock.patch("rich.get_console", quiet):
            trainer.train(self.config, self.run)
        self.params = {step: weights.load(self.run, step).params for step in STEPS}
        self.member = Member(self.config, self.run, None, np.arange(self.config.train.batch_size))
        self.saved = {s: weights.model.unstack(self.member.definition, self.params[s]) for s in STEPS}
        where = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec())
        shapes = weights.model.canonical_shapes(self.member.definition)
        self.like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for n, x in shapes.items()}

    def __call__(self, chance: random.Random) -> str:
        run = self.folder / "case"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.run, run)
        resealed = chance.random() < 0.3
        if resealed:
            self.record(run / "checkpoints" / str(chance.choice(STEPS)), chance)
        else:
            for _ in range(chance.choice((1, 1, 2))):
                self.harm(run, chance)
        with mock.patch("rich.get_console", quiet):
            said = [self.read(run, chance) if chance.random() < 0.3 else "", self.resume(run)]
        now = state.status(run, STEPS[-1])
        assert now.state in ("finished", "queued", "failed")
        return ("resealed, " if resealed else "") + " ".join(filter(None, said))

    def harm(self, run: Path, chance: random.Random) -> None:
        files = [path for path in run.rglob("*") if path.is_file()]
        small = [
            path for path in files if path.name in ("metadata", "config.json", "metrics.jsonl", seal.NAME)
        ]
        path = chance.choice(small if chance.random() < 0.6 else files)
        content = path.read_bytes()
        lines = content.splitlines()
        if chance.random() < 0.1:
            path.unlink()
        elif path.suffix == ".jsonl" and lines and chance.random() < 0.5:
            at = chance.randrange(len(lines))
            path.write_bytes(b"\n".join([*lines[:at], in_file(lines[at], chance), *lines[at:]]))
        else:
            path.write_bytes(in_file(content, chance))

    def record(self, path: Path, chance: random.Random) -> None:
        """The record of a checkpoint changed, and sealed as if it had been written so."""
        record = path / "run" / "metadata"
        value = json.loads(record.read_bytes())
        for _ in range(chance.randint(1, 2)):
            value = in_json(value, chance)
            if not isinstance(value, dict):
                break
        record.write_text(json.dumps(value))
        (path / seal.NAME).unlink()
        seal.write(path)

    def read(self, run: Path, chance: random.Random) -> str:
        """As generate, eval and export read it."""
        try:
            found = weights.load(run, chance.choice((None, *STEPS)))
        except (ConfigError, RunError):
            return "not read"
        assert jax.tree.all(jax.tree.map(np.array_equal, found.params, self.params[found.step]))
        assert weights.tokenizer(run, found.config) is not None
        return "read"

    def resume(self, run: Path) -> str:
        """As train.py resumes it, to its first batch."""
        member = copy.copy(self.member)
        member.workdir, member.saved, member.metrics = run, {}, {}
        with ExitStack() as stack:
            member.open(stack, "auto")
            start = checkpoint.choose("auto", member.saves)
            assert start in (None, *STEPS), f"resumed at {start}"
            if start is None:
                return "anew"
            member.read_record(start)
            found = member.saves.restore(start, {"params": self.like})["params"]
            saved = self.saved[start]
            assert all(np.array_equal(found[name], saved[name]) for name in saved), "other parameters"
            member.begin(stack, start)
            assert all(line["step"] <= start for line in member.book.kept)
            assert all(type(one) is int and one >= 0 for one in (member.watch.skipped, member.watch.in_a_row))
            for line in logbook.read(run / "metrics.jsonl"):
                state.number(line, "loss")
            return f"resumed at {start}"


def quiet() -> Console:
    return Console(quiet=True)


def cases(folder: Path) -> Callable[[random.Random], str]:
    return Cases(folder)
