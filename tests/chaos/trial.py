"""One small real run that is started again and again, and the undisturbed runs that it is compared with."""

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from tests import process_runs, tiny
from tests.chaos.child import checksum

ROOT = Path(__file__).parents[2]
NONE: Mapping[str, str] = MappingProxyType({})
SECONDS = 600  # for one start; far more than it takes
STEPS, POISONED = 48, (13, 14, 31)
FIELDS = {
    "model__pattern": "retnet", "train__steps": STEPS, "train__max_skipped": 3, "log__every_steps": 2,
    "checkpoint__every_steps": 6, "checkpoint__keep_best": 0, "eval__every_steps": 9,
}  # fmt: skip
KINDS = ("text", "shards", "poisoned", "two processes")


class Corpus:
    """Text, shards made of it, and the undisturbed run of each kind."""

    def __init__(self, folder: Path):
        from hybridlm import config as configs
        from hybridlm import member
        from hybridlm.data import prepare

        self.folder = folder
        text = tiny.write_text(folder)
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            prepare.prepare(text, str(folder / "shards"), "bytes", holdout=0.3, shard_tokens=2000)
        self.configs: dict[str, Path] = {}
        self.known: dict[str, list[dict[str, Any]]] = {}
        self.moments: dict[str, Counter[str]] = defaultdict(Counter)  # of kills, by command
        self.lock = threading.Lock()
        for kind in KINDS:
            config = tiny.config(text, **FIELDS)
            if kind == "shards":
                config.data = configs.data("shards", path=str(folder / "shards"))
            resolved = configs.resolve(config)
            self.configs[kind] = folder / f"{kind}.json"
            self.configs[kind].write_text(configs.to_json(resolved))
            if kind == "poisoned":
                source = member.build_data(resolved, "train")
                self.sums = [int(checksum(source.batch(step)["tokens"], np)) for step in range(STEPS)]
        assert len(set(self.sums)) == STEPS

    def whole(self, kind: str) -> list[dict[str, Any]]:
        """Lines of metrics of the undisturbed run of this kind, which is made when first asked for."""
        with self.lock:
            if kind not in self.known:
                trial = Trial(self, kind, self.folder / f"whole-{kind}")
                assert trial.run() == 0, trial.said()
                self.known[kind] = tiny.lines(trial.workdir)
        return self.known[kind]


class Trial:
    """One run that is started again and again. workdir: what it writes; shards: a copy that may be harmed.

    Both have names that shells, globs and lists would read otherwise.
    """

    def __init__(self, corpus: Corpus, kind: str, folder: Path):
        folder.mkdir()
        self.corpus, self.kind, self.folder, self.workdir = corpus, kind, folder, folder / "a run's $x"
        self.starts = 0
        self.arguments = [f"--config={corpus.configs[kind]}", f"--workdir={self.workdir}"]
        if kind == "shards":
            self.shards = shutil.copytree(corpus.folder / "shards", folder / "sh[a]rds, $x")
            self.arguments.append(f"--config.data.path={self.shards}")

    def start(
        self, *more: str, pause: str = "0.02", poison: tuple[int, ...] = (), breaks: str = ""
    ) -> subprocess.Popen:
        steps = poison or (POISONED if self.kind == "poisoned" else ())
        sums = ",".join(str(self.corpus.sums[step - 1]) for step in steps)
        asked = {"POISON": sums, "PAUSE": pause, "BREAKS": breaks, "STEPS": str(STEPS)}
        environment = {f"CHAOS_{name}": value for name, value in asked.items()}
        return self.command("tests.chaos.child", *self.arguments, *more, environment=environment)

    def command(self, *words: str, environment: Mapping[str, str] = NONE) -> subprocess.Popen:
        """python -m ``words``: any of our commands."""
        self.starts += 1
        given = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
        with self.log.open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *words], cwd=ROOT, env=given, stdout=log, stderr=subprocess.STDOUT
            )

    def start_two(self, meet: float = 300, silent: float = 60, **more: Any) -> list[subprocess.Popen]:
        """meet, silent: seconds that they wait for each other.  more: as for `process_runs.start`."""
        self.starts += 1
        environment = {"CHAOS_MEET": str(meet), "CHAOS_SILENT": str(silent)}
        program = ("-m", "tests.chaos.child")
        return process_runs.start(2, self.arguments, self.log, program=program, more=environment, **more)

    @property
    def log(self) -> Path:
        return self.folder / f"log-{self.starts}"

    def said(self) -> str:
        logs = sorted(self.log.iterdir()) if self.log.is_dir() else [self.log]
        return "".join(log.read_text(errors="replace") for log in logs)

    def run(self, *more: str, poison: tuple[int, ...] = (), breaks: str = "") -> int:
        """A start that nothing happens to but what ``breaks``; its exit code."""
        if self.kind == "two processes":
            return max(process_runs.finish(self.start_two(), SECONDS))
        return finish(self.start(*more, pause="0", poison=poison, breaks=breaks))

    def refused(self, code: int, pattern: str, found: int) -> bool:
        """Asserts that the last start ended with the right error."""
        named = re.search(pattern, self.said())
        assert found == code and named, f"exit code {found}, wanted {code} and {pattern!r}"
        assert "Traceback" not in self.said(), "a traceback"
        return True

    def lines(self) -> int:
        path = self.workdir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def at_random(self, process: subprocess.Popen, chance: random.Random) -> bool:
        """Waits for a random moment: mostly after some line, at times in the start. False: it had ended."""
        if chance.random() < 0.2:
            moment = time.monotonic() + chance.uniform(0.5, 8)
            waits = lambda: time.monotonic() < moment
        else:
            wanted = min(self.lines() + chance.randint(1, 12), 26)
            waits = lambda: self.lines() < wanted
        begun = time.monotonic()
        while waits() and process.poll() is None and time.monotonic() < begun + SECONDS:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.03))
        return process.poll() is None

    def newest(self) -> Path | None:
        steps = [int(path.name) for path in self.workdir.glob("checkpoints/*") if path.name.isdigit()]
        return self.workdir / "checkpoints" / str(max(steps)) if steps else None

    def check(self) -> None:
        """Lets the run finish and compares."""
        code = self.run()
        assert code == 0, f"the last start ended with exit code {code}"
        found, whole = tiny.lines(self.workdir), self.corpus.whole(self.kind)
        assert found == whole, "metrics differ from the undisturbed run's"


def finish(process: subprocess.Popen) -> int:
    try:
        return process.wait(SECONDS)
    finally:
        process.kill()
        process.wait()
