"""Faults. Each starts the run of a trial at least once and returns whether the right answer was a refusal."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from launch import state
from tests import process_runs, tiny
from tests.chaos import commands
from tests.chaos.trial import SECONDS, STEPS, Trial, finish

Fault = Callable[[Trial, random.Random], bool]
LOOKS = ("validation", "tasks", "sample", "plot", "W&B at its start", "W&B", "stdout, full", "stdout, closed")


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
    training = trial.at_random(process, chance) and "step " in trial.said()
    process.send_signal(first)
    second = chance.random() < 0.3
    if second:
        time.sleep(chance.uniform(0, 0.02))
        process.send_signal(signal.SIGTERM)
    code = finish(process)
    if training and not second:
        assert code in (0, 3), f"exit code {code} after {first.name}"
    if code == 3:
        said = re.search(
            r"stopped by \w+ (before step|with a complete checkpoint at step) (\d+)", trial.said()
        )
        assert said, "exit code 3 without a word"
        if said[1] != "before step":
            newest = trial.newest()
            assert newest is not None and newest.name == said[2], "the checkpoint is not there"
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
    if count > 1:
        return False  # passed over; `check` will tell
    code = trial.run("--resume=must")
    if code == 0 and path.parent == newest and path.name in unsealed:
        return False  # harmless
    trial.refused(1, r"no checkpoint is sound \(\d+: ", code)
    shutil.rmtree(newest)
    shutil.copytree(backup, newest)
    return True


def harm_shard(trial: Trial, chance: random.Random) -> bool:
    """Before a start, a bit flipped, an end cut off or a file deleted; during one, cut or deleted."""
    path = chance.choice(sorted(trial.shards.glob("train-*.tokens")))
    whole, how = path.read_bytes(), chance.choice(("flip", "cut", "delete"))
    during = how != "flip" and chance.random() < 0.6
    if during:
        process = trial.start()
        if not trial.at_random(process, chance):
            return False
        training = "step " in trial.said()
    if how == "flip":
        flip(path, chance)
    elif how == "cut":
        os.truncate(path, len(whole) // 2)
    else:
        path.unlink()
    code = finish(process) if during else trial.run()
    path.write_bytes(whole)
    if during and code == 0:
        return False  # every batch had been read ahead; `check` tells whether rightly
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
    if begin == STEPS:
        return False  # it had ended before it could be killed
    first = chance.randint(min(begin + 1, STEPS - 5), STEPS - 5)
    code = trial.run(poison=tuple(range(first, first + 5)))
    trial.refused(1, r"not finite, \d updates in a row since step \d+; .* hybridlm\.run\.replay", code)
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
    return trial.refused(
        2,
        r"a resumed run cannot change it; changed since the checkpoint: |holds a run of another pattern",
        code,
    )


def other_metric(trial: Trial, chance: random.Random) -> bool:
    """A resumption that keeps the best by another metric, killed as well."""
    kill(trial, chance)
    process = trial.start("--config.checkpoint.best_metric=loss", "--config.checkpoint.keep_best=1")
    trial.at_random(process, chance)
    process.kill()
    finish(process)
    return False


def odd_place(trial: Trial, chance: random.Random) -> bool:
    """A workdir that could not be read again; what has other odd names lies in every trial."""
    place = trial.folder / chance.choice(("r[1]", "a\\b", "what?", "gs:")) / "run"
    code = trial.run(f"--workdir={place}")
    assert not place.parent.exists(), "something was written"
    return trial.refused(2, "no checkpoint can be kept below a path with", code)


def kill_before_the_end(trial: Trial, chance: random.Random) -> bool:
    """SIGKILL between the last line of metrics and the seal of the last checkpoint."""
    code = trial.run(breaks="final save")
    assert code == -signal.SIGKILL or trial.lines(), f"exit code {code}"
    if code == -signal.SIGKILL:
        assert tiny.lines(trial.workdir)[-1]["step"] == STEPS
        assert state.status(trial.workdir, STEPS).state != "finished", "called finished"
    return False


def look(what: str, trial: Trial, chance: random.Random) -> bool:
    """A way of looking fails, at every step of a whole run: nothing but what it looks for may be lost."""
    if chance.random() < 0.3:
        kill(trial, chance)
    code = trial.run(*(("--config.log.wandb_mode=offline",) if "W&B" in what else ()), breaks=what)
    assert code == 0, f"exit code {code} when {what} fails"
    lost = {"validation": "val_", "sample": "sample"}.get(what, "nothing")
    known = lambda lines: [{k: v for k, v in line.items() if not k.startswith(lost)} for line in lines]
    assert known(tiny.lines(trial.workdir)) == known(trial.corpus.whole(trial.kind)), "another trajectory"
    assert state.status(trial.workdir, STEPS).state == "finished", "no sealed checkpoint at the end"
    if what in ("validation", "tasks", "sample"):
        first = re.search(r"steps\s+(\d+) to ", trial.said())
        left = first is None or int(first[1]) <= STEPS  # an earlier fault may have come to the end
        events = trial.workdir / "events.jsonl"
        assert not left or "No space left" in events.read_text(), "no event"
    if what == "validation":
        shutil.rmtree(trial.workdir)  # for `check`: its lines lack what was not measured, rightly
    return False


def kill_one(trial: Trial, chance: random.Random) -> bool:
    """Two processes, one of them killed or stopped."""
    seconds, how = 12, chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
    running = trial.start_two(silent=seconds if how == signal.SIGSTOP else 60)
    wanted = min(trial.lines() + chance.randint(1, 12), 26)
    while trial.lines() < wanted and all(process.poll() is None for process in running):
        time.sleep(0.01)
    victim = chance.randint(0, 1)
    if running[victim].poll() is None and running[1 - victim].poll() is None:
        running[victim].send_signal(how)
        try:
            code = running[1 - victim].wait(2 * seconds + 30)
        finally:
            running[victim].kill()
            process_runs.finish(running, 60)
        said = (trial.log / str(1 - victim)).read_text()
        if victim == 0 and code == -signal.SIGABRT:  # JAX was quicker: docs/trust.md, exit code 134
            assert how == signal.SIGKILL and "another task died" in said
        else:
            assert code in (0, 1), f"exit code {code} of the survivor"
            assert code == 0 or f"process {victim}" in said, "the survivor does not name the other"
    else:
        process_runs.finish(running, 60)
    return False


def differ(trial: Trial, chance: random.Random) -> bool:
    """Two processes, of which one would train something else."""
    field = chance.choice(
        ("optimizer.learning_rate=0.5", "train.seed=9", "train.steps=9", "eval.every_steps=5")
    )
    own = [[], []]
    own[chance.randint(0, 1)] = [f"--config.{field}"]
    codes = process_runs.finish(trial.start_two(own=own), SECONDS)
    assert codes == [2, 2], f"exit codes {codes}"
    return trial.refused(2, "is .* in process 1, and .* in process 0", 2)


def never_come(trial: Trial, chance: random.Random) -> bool:
    """One of two processes never comes."""
    missing, began = chance.randint(0, 1), time.monotonic()
    codes = process_runs.finish(trial.start_two(meet=3, absent=[missing]), SECONDS)
    assert codes == [2] and time.monotonic() - began < SECONDS / 2, f"exit codes {codes}"
    return trial.refused(2, rf"process {missing} (of 2 did not come|did not answer there) within 3 s", 2)


def harm_records(trial: Trial, chance: random.Random) -> bool:
    """config.json, layers.json, events.jsonl and a line of metrics.jsonl damaged after a kill."""
    kill(trial, chance)
    harm = chance.choice((b"", b"\0" * 30, b"{\xff"))
    for name in ("config.json", "layers.json", "events.jsonl", "wandb_id"):
        if (trial.workdir / name).exists():
            (trial.workdir / name).write_bytes(harm)
    metrics = trial.workdir / "metrics.jsonl"
    if metrics.exists():
        lines = metrics.read_bytes().splitlines(keepends=True)
        lines.insert(chance.randint(0, len(lines)), harm + b"\n")
        metrics.write_bytes(b"".join(lines))
    return False


def rename(trial: Trial, chance: random.Random) -> bool:
    """The newest checkpoint under another number, or a link to it."""
    kill(trial, chance)
    if newest := trial.newest():
        other = newest.with_name(str(chance.randint(100, 999)))
        newest.rename(other) if chance.random() < 0.5 else other.symlink_to(newest.name)
    return False


PROCESSES: dict[str, Fault] = {
    "one of two processes killed or stopped": kill_one,
    "two processes differ": differ,
    "one of two processes never comes": never_come,
}
FAULTS: dict[str, Fault] = {
    "killed": kill,
    "killed while saving": kill_in_a_save,
    "killed before the final seal": kill_before_the_end,
    "signal": stop,
    "checkpoint damaged": damage_checkpoint,
    "checkpoint renamed": rename,
    "records damaged": harm_records,
    "shard damaged or gone": harm_shard,
    "disk full or read-only": disk,
    "nan, too many in a row": poison,
    "second run": second_run,
    "config changed": change_config,
    "another metric": other_metric,
    "workdir with brackets": odd_place,
    **{f"{what} fails": partial(look, what) for what in LOOKS},
    **commands.FAULTS,
    **PROCESSES,
}


def fitting(kind: str, root: bool) -> list[str]:
    """Faults that a trial of this kind can have; nan beyond the poisoned steps needs text."""
    if kind == "two processes":
        return list(PROCESSES)
    needs = {"shard damaged or gone": kind == "shards", "nan, too many in a row": kind == "text"}
    needs |= {"disk full or read-only": root} | dict.fromkeys(PROCESSES, False)
    return [name for name in FAULTS if needs.get(name, True)]
