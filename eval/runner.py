"""Measures tasks on a subject, one after the other, and keeps what was measured in a file."""

import io
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval import convergence
from eval.statistics import accuracy
from eval.subject import Progress, Subject
from eval.tasks.base import Setting, Task, TooShort
from hybridlm import untrusted
from hybridlm.errors import ConfigError, RunError
from hybridlm.run import private

log = logging.getLogger("hybridlm")
Result = dict[str, Any]
IDENTITY = {"step": untrusted.NATURAL, "samples": untrusted.NATURAL, "seed": int, "checkpoint?": str}
RESULT = {
    "task": str, "length": untrusted.NATURAL, "accuracy": float, "low": float, "high": float,
    "samples": untrusted.NATURAL, "chance": (float, type(None)), "identity": IDENTITY,
    "scores?": [float], "by_turn?": [float], "kept_bytes?": untrusted.NATURAL,
}  # fmt: skip


class Plan(NamedTuple):
    """lengths: of contexts in tokens; () takes each task's own.  one: of every task, but the length."""

    lengths: tuple[int, ...]
    one: Setting

    def settings(self, task: Task) -> list[Setting]:
        one = self.one if getattr(task, "seeded", True) else self.one._replace(seed=0)
        return [one._replace(length=n) for n in self.lengths or task.lengths]


# (what is measured, number of samples) -> what to call as they are done
Watch = Callable[[str, int], Progress]


def missing(
    subject: Subject, tasks: Sequence[Task], plan: Plan, known: dict[str, Result]
) -> list[tuple[Task, Setting]]:
    """What ``known`` results do not hold of the plan, in its order."""
    every = [(task, setting) for task in tasks for setting in plan.settings(task)]
    identity = lambda task, setting: known.get(name_of(task, setting), {}).get("identity")
    return [(t, s) for t, s in every if identity(t, s) != _identity(subject, t, s)]


def name_of(task: Task, setting: Setting) -> str:
    return f"{task.name}@{setting.length}"


def measure(
    subject: Subject,
    tasks: Sequence[Task],
    plan: Plan,
    known: dict[str, Result] | None = None,
    *,
    watch: Watch = lambda name, samples: lambda done: None,
    done: Callable[[dict[str, Result]], None] = lambda results: None,
    left_out: Callable[[str, Exception], None] | None = None,
) -> dict[str, Result]:
    """ "task@length" -> Result for every task and length of the plan.

    known: earlier results, taken over where the same was measured.
    done: called with what this call has measured so far, after each one.
    left_out: called with what could not be measured and why; by default a warning says so, and if it is the
        only one that was asked for, the error is raised.
    """
    if subject.tokenizer is None and all(task.text for task in tasks):
        _ = subject.text_tokenizer  # raises: nothing could be measured
    results, own = dict(known or {}), dict[str, Result]()
    for task, setting in missing(subject, tasks, plan, results):
        name = name_of(task, setting)
        results.pop(name, None)
        began = time.perf_counter()
        try:
            scores = task.run(subject, setting, watch(name, setting.samples))
            chance = task.chance(subject.config)
            if not scores.size:
                raise TooShort("it has no samples")
        except Exception as error:
            of_task = isinstance(error, ConfigError | RunError) and len(tasks) > 1  # others are to be had
            if left_out is None and not (of_task or isinstance(error, TooShort)):
                raise
            (left_out or _warn)(name, error)
            continue
        seconds = round(time.perf_counter() - began, 2)
        results[name] = own[name] = {
            "task": task.name, "length": setting.length, **_numbers(scores), "chance": chance,
            "source": task.source, "seconds": seconds, "identity": _identity(subject, task, setting),
            "kept_bytes": subject.kept_bytes(setting.length),
        }  # fmt: skip
        done(own)
    return results


def _numbers(scores: Any) -> Result:
    """Of one score a sample, or of one for each turn of it: they share a context, so samples are sessions."""
    sessions = scores if scores.ndim == 1 else scores.mean(axis=1)
    measured = accuracy(sessions.tolist())
    turns = {} if scores.ndim == 1 else {"by_turn": [round(float(x), 6) for x in scores.mean(axis=0)]}
    return {
        "accuracy": measured.mean, "low": measured.low, "high": measured.high, "samples": measured.samples,
        **turns, "scores": [round(float(x), 6) for x in sessions],
    }  # fmt: skip


def _warn(name: str, error: Exception) -> None:
    log.warning("%s left out: %s", name, error)


def _identity(subject: Subject, task: Task, setting: Setting) -> dict[str, Any]:
    """What two equal measurements have in common."""
    tokens = subject.tokenizer.fingerprint if subject.tokenizer and task.text else None
    ends = subject.tokenizer.more_ends if subject.tokenizer and task.text else ()
    return {
        "step": subject.step,
        "checkpoint": subject.checkpoint,
        "samples": setting.samples,
        "seed": setting.seed,
        "tokenizer": tokens,
        "haystack": setting.haystack.fingerprint if task.text else None,
        "data_dir": private.hide(setting.data_dir),
        "examples": task.examples(subject, setting) if hasattr(task, "examples") else None,
        **({"ends": list(ends)} if ends else {}),
    }


def read(path: Path) -> dict[str, Result]:
    """The results in ``path``, {} when there is none; RunError for a file that is not one of results."""
    return read_whole(path)["results"] if path.exists() else {}


def known_of(folder: Path, subject: Subject) -> dict[str, Result]:
    """What the files in ``folder`` hold of the subject's checkpoint; see `taken_up`."""
    names = f"eval-{subject.step}.json", "eval.json"
    every = [item for name in names for item in read(folder / name).items()]
    return {name: result for name, result in every if _of(subject, result)}


def taken_up(folder: Path, subject: Subject) -> dict[str, Result]:
    """What was measured of the subject's checkpoint before, from ``folder``.

    eval.json is of one checkpoint. Results of another go to eval-<its step>.json, from where they come back
    if that checkpoint is evaluated again.
    """
    path, found = folder / "eval.json", known_of(folder, subject)
    others = [result["identity"]["step"] for result in read(path).values() if not _of(subject, result)]
    if others:
        aside = path.with_name(f"eval-{others[-1]}.json")
        put(aside, lambda: os.replace(path, aside))
        said = "%s held results of another checkpoint (step %d): they are in %s"
        log.warning(said, path, others[-1], aside)
    return found


def kept(folder: Path, subject: Subject, own: dict[str, Result], about: dict[str, Any]) -> None:
    """`write` of eval.json: what this process measured (``own``) over what is there of the same checkpoint.

    What it read when it began is not written again: another evaluation may have measured it anew meanwhile.
    """
    write(folder / "eval.json", taken_up(folder, subject) | own, about)


def _of(subject: Subject, result: Result) -> bool:
    identity = result["identity"]
    return (identity["step"], identity.get("checkpoint")) == (subject.step, subject.checkpoint)


def read_whole(path: Path) -> dict[str, Any]:
    """The file with what it says about the run; RunError where it is none of results, or damaged."""
    try:
        return untrusted.read_json(
            path, "eval.json", {"results": {str: RESULT}, "convergence?": {str: convergence.RECORD}}
        )
    except ConfigError as error:
        said = f"{error.allowed} {error.fix}".strip().rstrip(".")
        raise RunError(f"{path}: is not a file of results ({said}); remove it to start anew.") from error


def write(path: Path, results: dict[str, Result], about: dict[str, Any]) -> None:
    """Puts results at ``path``, whole or not at all; RunError where the disk refuses."""
    put(path, lambda: untrusted.write_json(path, {**about, "results": results}))


def put(path: Path, write: Callable[[], None]) -> None:
    """``write()``, which writes ``path``; RunError where the disk refuses."""
    try:
        write()
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}).") from error


def put_figure(path: Path, figure: Any) -> None:
    """`put` of a picture, as a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    put(path, lambda: untrusted.write_bytes(path, out.getvalue()))


def folder(workdir: str | Path, ema: bool) -> Path:
    """Where the results of a run go: its workdir; ``ema`` in it for those of the average of its weights."""
    return Path(workdir) / "ema" if ema else Path(workdir)


def check_writable(folder: Path) -> None:
    """ConfigError, before anything is measured, for a folder in which the results cannot be put."""
    probe = folder / ".eval.probe"
    try:
        folder.mkdir(exist_ok=True)
        untrusted.write_bytes(probe, b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        fix = "What would be measured could not be kept."
        allowed = f"cannot be written to ({error.strerror})"
        raise ConfigError("--workdir", str(folder), allowed, fix) from error


def metrics(results: Iterable[tuple[str, Result]]) -> dict[str, float]:
    """Flat numbers for logging: eval/task@length."""
    return {f"eval/{name}": r["accuracy"] for name, r in results if math.isfinite(r["accuracy"])}
