"""Breaks small real runs at random, and holds every one against a run that nothing happened to.

    python -m tests.chaos --minutes 20 --seed 0

A trial starts train.py in a folder of its own, injects one to three faults, each in its own start, and then
lets the run finish. It passes if every faulty start ended as that fault should end (resumable, or refused
with the right error) and metrics.jsonl equals the undisturbed run's, bit for bit. Anything else is "lost".
Faults of the disk need root, for a small tmpfs; without it they are left out. A seed and a trial's number
decide its faults; when exactly they strike is up to the machine.
"""

import argparse
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tests import multiprocess, tiny

ROOT = Path(__file__).parents[1]
SECONDS = 240  # for one start; far more than it takes
STEPS, POISONED = 48, (13, 14, 31)
FIELDS = {
    "model__pattern": "retnet", "train__steps": STEPS, "train__max_skipped": 3, "log__every_steps": 2,
    "checkpoint__every_steps": 6, "checkpoint__keep_best": 0, "eval__every_steps": 9,
}  # fmt: skip
KINDS = ("text", "shards", "poisoned", "two processes")
# What tensorstore's threads print of a write that failed, besides the error that they return.
NOISE = "RuntimeError: Event loop is closed"
PAUSE = "0.02"  # seconds before each step, so that faults fall between steps and not only into the start


def child(arguments: list[str]) -> int:
    """train.py, slowed down, and with the loss of some steps made nan, in the compiled program."""
    import jax.numpy as jnp

    import train
    from hybridlm import program, sharding

    poisoned = [int(total) for total in os.environ.get("CHAOS_POISON", "").split(",") if total]
    honest, put = program.lm.loss_fn, sharding.put_batch

    def loss_fn(definition, params, batch, **options):
        loss, aux = honest(definition, params, batch, **options)
        struck = jnp.isin(checksum(batch["tokens"], jnp), jnp.array(poisoned))
        return loss * jnp.where(struck, jnp.nan, 1.0), aux

    def slowly(*args):
        time.sleep(float(os.environ["CHAOS_PAUSE"]))
        return put(*args)

    if poisoned:
        program.lm.loss_fn = loss_fn
    sharding.put_batch = slowly
    return train.main(arguments)


def checksum(tokens, numpy):
    """Tells the batches of these small runs apart."""
    flat = tokens.reshape(-1)
    return numpy.sum(flat * numpy.arange(1, flat.size + 1, dtype=flat.dtype))


class Corpus:
    """Text, shards made of it, and the undisturbed run of each kind."""

    def __init__(self, folder: Path):
        from hybridlm import config as configs
        from hybridlm import trainer
        from hybridlm.data import prepare

        self.folder = folder
        text = tiny.write_text(folder)
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            prepare.prepare(text, str(folder / "shards"), "bytes", holdout=0.3, shard_tokens=2000)
        self.configs, self.whole = {}, {}
        for kind in KINDS:
            config = tiny.config(text, **FIELDS)
            if kind == "shards":
                config.data = configs.data("shards", path=str(folder / "shards"))
            resolved = configs.resolve(config)
            self.configs[kind] = folder / f"{kind}.json"
            self.configs[kind].write_text(configs.to_json(resolved))
            if kind == "poisoned":
                source = trainer.build_data(resolved, "train")
                self.sums = [int(checksum(source.batch(step)["tokens"], np)) for step in range(STEPS)]
        assert len(set(self.sums)) == STEPS
        for kind in self.configs:
            trial = Trial(self, kind, folder / f"whole-{kind}")
            assert trial.run() == 0, trial.said()
            self.whole[kind] = tiny.lines(trial.workdir)


class Trial:
    """One run that is started again and again. workdir: what it writes; shards: a copy that may be harmed."""

    def __init__(self, corpus: Corpus, kind: str, folder: Path):
        folder.mkdir()
        self.corpus, self.kind, self.folder, self.workdir = corpus, kind, folder, folder / "run"
        self.starts = 0
        self.arguments = [f"--config={corpus.configs[kind]}", f"--workdir={self.workdir}"]
        if kind == "shards":
            shutil.copytree(corpus.folder / "shards", folder / "shards")
            self.arguments.append(f"--config.data.path={folder / 'shards'}")

    def start(self, *more: str, pause: str = PAUSE, poison: tuple[int, ...] = ()) -> subprocess.Popen:
        steps = poison or (POISONED if self.kind == "poisoned" else ())
        sums = ",".join(str(self.corpus.sums[step - 1]) for step in steps)
        environment = os.environ | {"CHAOS_POISON": sums, "CHAOS_PAUSE": pause, "JAX_PLATFORMS": "cpu"}
        self.starts += 1
        with self.log.open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.chaos", "--child", *self.arguments, *more],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def start_two(self) -> list[subprocess.Popen]:
        self.starts += 1
        return multiprocess.start(2, self.arguments, self.folder / f"log-{self.starts}")

    @property
    def log(self) -> Path:
        return self.folder / f"log-{self.starts}"

    def said(self) -> str:
        logs = sorted(self.log.iterdir()) if self.log.is_dir() else [self.log]
        return "".join(log.read_text(errors="replace") for log in logs)

    def run(self, *more: str, poison: tuple[int, ...] = ()) -> int:
        """A start that nothing happens to; its exit code."""
        if self.kind == "two processes":
            return max(multiprocess.finish(self.start_two(), SECONDS))
        return finish(self.start(*more, pause="0", poison=poison))

    def refused(self, code: int, pattern: str, found: int) -> bool:
        """Asserts that the last start ended with the right error."""
        named = re.search(pattern, self.said())
        assert found == code and named, f"exit code {found}, wanted {code} and {pattern!r}"
        assert self.said().count("Traceback") <= self.said().count(NOISE), "a traceback"  # threads interleave
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
        found, whole = tiny.lines(self.workdir), self.corpus.whole[self.kind]
        assert found == whole, "metrics differ from the undisturbed run's"


def finish(process: subprocess.Popen) -> int:
    try:
        return process.wait(SECONDS)
    finally:
        process.kill()
        process.wait()


# Faults. Each starts the run at least once and returns whether the right answer was a refusal.


def kill(trial: Trial, chance: random.Random) -> bool:
    """SIGKILL at a random moment."""
    process = trial.start()
    trial.at_random(process, chance)
    process.kill()
    finish(process)
    return False


def kill_in_a_save(trial: Trial, chance: random.Random) -> bool:
    """SIGKILL while a checkpoint is being written."""
    process = trial.start()
    trial.at_random(process, chance)
    while process.poll() is None and not list(trial.workdir.glob("checkpoints/*tmp*")):
        time.sleep(0.0005)
    time.sleep(chance.choice((0, 0.001, 0.003, 0.01, 0.03)))
    process.kill()
    finish(process)
    return False


def stop(trial: Trial, chance: random.Random) -> bool:
    """SIGTERM, SIGINT or SIGUSR1, and at times a second one."""
    process = trial.start()
    first = chance.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    training = trial.at_random(process, chance) and "compiled" in trial.said()
    process.send_signal(first)
    second = chance.random() < 0.3
    if second:
        time.sleep(chance.uniform(0, 0.02))
        process.send_signal(signal.SIGTERM)
    code = finish(process)
    if training and not second:
        assert code in (0, 3), f"exit code {code} after {first.name}"
    if code == 3:
        step = int(re.findall(r"a complete checkpoint at step (\d+)", trial.said())[-1])
        assert trial.newest() is not None and trial.newest().name == str(step), "the checkpoint is not there"
    return False


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def damage_checkpoint(trial: Trial, chance: random.Random) -> bool:
    """A bit flipped in, an end cut off or a file deleted from the newest checkpoint of a killed run."""
    kill(trial, chance)
    newest = trial.newest()
    if newest is None:
        return False
    count = sum(path.name.isdigit() for path in newest.parent.iterdir())
    backup = trial.folder / f"backup-{trial.starts}"
    shutil.copytree(newest, backup)
    path = chance.choice([one for one in sorted(newest.rglob("*")) if one.is_file() and one.stat().st_size])
    how = chance.choice(("flip", "cut", "delete"))
    if how == "flip":
        flip(path, chance)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
    else:
        path.unlink()
    unsealed = ("_CHECKPOINT_METADATA", "commit_success.txt", "SHA256SUMS")  # written after the seal, or it
    if count > 1 or (path.parent == newest and path.name in unsealed):
        return False  # passed over, or harmless; `check` will tell
    trial.refused(1, r"no checkpoint is sound \(\d+: ", trial.run("--resume=must"))
    shutil.rmtree(newest)
    shutil.copytree(backup, newest)
    return True


def harm_shard(trial: Trial, chance: random.Random) -> bool:
    """Before a start, a bit flipped, an end cut off or a file deleted; during one, cut or deleted."""
    path = chance.choice(sorted((trial.folder / "shards").glob("train-*.tokens")))
    whole, how = path.read_bytes(), chance.choice(("flip", "cut", "delete"))
    during = how != "flip" and chance.random() < 0.6
    if during:
        process = trial.start()
        if not trial.at_random(process, chance):
            return False
        training = "compiled" in trial.said()
    if how == "flip":
        flip(path, chance)
    elif how == "cut":
        os.truncate(path, len(whole) // 2)
    else:
        path.unlink()
    code = finish(process) if during else trial.run()
    path.write_bytes(whole)
    if during and training and code == 0:
        return False  # every batch had been read ahead
    wanted = 1 if how == "flip" or (during and training) else code
    return trial.refused(wanted, r"the shard (has|is|cannot)|is damaged: ", code)


def disk(trial: Trial, chance: random.Random) -> bool:
    """The workdir on a tmpfs too small for its checkpoints, or one that turns read-only."""
    trial.workdir.mkdir(exist_ok=True)
    inner = trial.folder / "disk"
    inner.mkdir()
    read_only = chance.random() < 0.3
    size = "64m" if read_only else f"{chance.randint(60, 900)}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", inner], check=True)
    there, trial.workdir = trial.workdir, inner
    try:
        trial.arguments[1] = f"--workdir={inner}"
        if read_only:
            process = trial.start()
            trial.at_random(process, chance)
            process.kill()  # files open for writing would keep the mount from turning
            finish(process)
            remount = ["mount", "-o", "remount,ro", "none", inner]
            while subprocess.run(remount, stderr=subprocess.DEVNULL).returncode:
                time.sleep(0.1)  # its last writes are still under way
            trial.refused(1, r"[Rr]ead-only", trial.run())
        else:
            code = trial.run()
            refused = code != 0 and trial.refused(1, r"[\d,]+ bytes|No space left|disk is full", code)
        subprocess.run(["mount", "-o", "remount,rw,size=64m", "none", inner], check=True)
        kill(trial, chance)
        there.rmdir() if not any(there.iterdir()) else shutil.rmtree(there)
        shutil.copytree(inner, there)
    finally:
        subprocess.run(["umount", "-l", inner], check=True)
        trial.workdir, trial.arguments[1] = there, f"--workdir={there}"
    return read_only or refused


def poison(trial: Trial, chance: random.Random) -> bool:
    """Too many steps in a row whose loss is nan: a named end, and a dump that replays."""
    kill(trial, chance)
    newest = trial.newest()
    begin = int(newest.name) if newest else 0
    first = chance.randint(min(begin + 1, STEPS - 5), STEPS - 5)
    code = trial.run(poison=tuple(range(first, first + 5)))
    trial.refused(1, r"not finite, \d updates in a row since step \d+; .* hybridlm\.replay", code)
    for step in (path for path in trial.workdir.glob("checkpoints/[0-9]*") if int(path.name) >= first):
        shutil.rmtree(step)  # saved after skipped updates that the undisturbed run does not skip
    return True


def second_run(trial: Trial, chance: random.Random) -> bool:
    """A second start on the same workdir."""
    process = trial.start(pause="0.2")
    if not trial.at_random(process, chance) or not (trial.workdir / "metrics.jsonl").exists():
        finish(process) if process.poll() is not None else process.kill()
        finish(process)
        return False
    code = trial.run()
    alive = process.poll() is None
    process.kill()
    finish(process)
    return alive and trial.refused(2, r"is in use by process \d+", code)


def change_config(trial: Trial, chance: random.Random) -> bool:
    """Resumption with what cannot be honoured: another model, vocabulary, batch, or other data."""
    kill(trial, chance)
    if trial.newest() is None:
        return False
    changes = ("model.d_model=32", "model.pattern=retnet*2", "model.vocab_size=300", "train.seed=5")
    code = trial.run(f"--config.{chance.choice((*changes, 'train.batch_size=4'))}")
    return trial.refused(2, r"a resumed run cannot change it; changed since the checkpoint: ", code)


def processes(trial: Trial, chance: random.Random) -> bool:
    """Two processes, one of them killed."""
    running = trial.start_two()
    wanted = min(trial.lines() + chance.randint(1, 12), 26)
    while trial.lines() < wanted and all(process.poll() is None for process in running):
        time.sleep(0.01)
    victim = chance.randint(0, 1)
    if running[victim].poll() is None and running[1 - victim].poll() is None:
        running[victim].kill()
        code = multiprocess.finish(running, 60)[1 - victim]
        said = (trial.log / str(1 - victim)).read_text()
        assert code in (0, 1), f"exit code {code} of the survivor"
        assert code == 0 or f"process {victim}" in said, "the survivor does not name the dead"
    else:
        multiprocess.finish(running, 60)
    return False


FAULTS: dict[str, Callable[[Trial, random.Random], bool]] = {
    "killed": kill,
    "killed while saving": kill_in_a_save,
    "signal": stop,
    "checkpoint damaged": damage_checkpoint,
    "shard damaged or gone": harm_shard,
    "disk full or read-only": disk,
    "nan, too many in a row": poison,
    "second run": second_run,
    "config changed": change_config,
    "one of two processes killed": processes,
}


def fitting(kind: str, root: bool) -> list[str]:
    """Faults that a trial of this kind can have; nan beyond the poisoned steps needs text."""
    if kind == "two processes":
        return ["one of two processes killed"]
    wanted = [name for name in FAULTS if (root or FAULTS[name] is not disk) and FAULTS[name] is not processes]
    if kind != "shards":
        wanted.remove("shard damaged or gone")
    if kind != "text":
        wanted.remove("nan, too many in a row")
    return wanted


def attempt(corpus: Corpus, number: int, seed: int) -> tuple[list[tuple[str, bool]], str]:
    """Trial ``number``: (its faults, with whether each was refused; what went wrong)."""
    chance = random.Random(f"{seed} {number}")
    kind = KINDS[-1] if number % 12 == 6 else KINDS[number % 3]
    names = fitting(kind, os.geteuid() == 0)
    chosen = [names[number // 3 % len(names)], *chance.choices(names, k=chance.choice((0, 0, 1, 1, 2)))]
    if chosen.count("disk full or read-only") > 1 or kind == KINDS[-1]:
        chosen = chosen[:1]
    trial = Trial(corpus, kind, corpus.folder / f"trial-{number}")
    done: list[tuple[str, bool]] = []
    try:
        for name in chosen:
            done.append((name, False))
            done[-1] = name, FAULTS[name](trial, chance)
        trial.check()
        shutil.rmtree(trial.folder)
        return done, ""
    except Exception:
        return done, f"trial {number} ({kind}), log {trial.log}:\n{traceback.format_exc(limit=-2)}"


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.chaos")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="trials at the same time")
    parser.add_argument("--folder", type=Path, help="where; default: a new one, removed if nothing is lost")
    flags = parser.parse_args()
    begun = time.monotonic()
    folder = flags.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(exist_ok=True)
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    corpus = Corpus(folder)
    until = time.monotonic() + 60 * flags.minutes
    injected, refused, lost = Counter[str](), Counter[str](), Counter[str]()
    numbers, trials = itertools.count(), []

    def work() -> None:
        while time.monotonic() < until:
            done, wrong = attempt(corpus, next(numbers), flags.seed)
            trials.append(wrong)
            injected.update(name for name, _ in done)
            refused.update(name for name, was in done if was)
            if wrong:
                lost[done[-1][0]] += 1
                print(wrong, flush=True)

    with ThreadPoolExecutor(flags.jobs) as pool:
        for worker in [pool.submit(work) for _ in range(flags.jobs)]:
            worker.result()
    count = len(trials)
    print(f"seed {flags.seed}, {count} trials, {(time.monotonic() - begun) / 60:.1f} minutes\n")
    print("| fault | injected | refused, rightly | lost |\n|---|---|---|---|")
    for name in FAULTS:
        print(f"| {name} | {injected[name]} | {refused[name]} | {lost[name]} |")
    total = sum(lost.values())
    print(f"| all | {sum(injected.values())} | {sum(refused.values())} | {total} |")
    print(f"\n{count - total} of {count} trials ended on the undisturbed run's metrics")
    if not total and not flags.folder:
        shutil.rmtree(folder)
    return int(total > 0 or not trials)


if __name__ == "__main__":
    sys.exit(child(sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main())
