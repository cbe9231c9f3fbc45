"""Measures tasks on a subject, one after the other, and keeps what was measured in a file."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.haystack import Haystack
from eval.statistics import accuracy
from eval.subject import Progress, Subject
from eval.tasks.base import Setting, Task, TooShort
from hybridlm.errors import ConfigError, RunError

log = logging.getLogger("hybridlm")
Result = dict[str, Any]


class Plan(NamedTuple):
    """lengths: of contexts in tokens; () takes each task's own.  samples: of each task and length.
    seed: of the samples.  haystack, data_dir: see `tasks.Setting`.
    """

    lengths: tuple[int, ...]
    samples: int
    seed: int
    haystack: Haystack
    data_dir: str = ""

    def settings(self, task: Task) -> list[Setting]:
        lengths = self.lengths or task.lengths
        return [Setting(n, self.samples, self.seed, self.haystack, self.data_dir) for n in lengths]


Watch = Callable[
    [str, int], Progress
]  # (what is measured, number of samples) -> what to call as they are done


def measure(
    subject: Subject,
    tasks: Sequence[Task],
    plan: Plan,
    known: dict[str, Result] | None = None,
    *,
    watch: Watch = lambda name, samples: lambda done: None,
    done: Callable[[dict[str, Result]], None] = lambda results: None,
) -> dict[str, Result]:
    """ "task@length" -> Result for every task and length of the plan.

    known: earlier results, taken over where the same was measured.
    done: called with all results after each one.
    A task that a model or length cannot be measured on is left out, with a warning that says why.
    """
    if subject.tokenizer is None and all(task.text for task in tasks):
        _ = subject.text_tokenizer  # raises: nothing could be measured
    results = dict(known or {})
    for task in tasks:
        for setting in plan.settings(task):
            name = f"{task.name}@{setting.length}"
            identity = _identity(subject, task, setting)
            if results.get(name, {}).get("identity") == identity:
                continue
            results.pop(name, None)
            began = time.perf_counter()
            try:
                scores = task.run(subject, setting, watch(name, setting.samples))
                chance = task.chance(subject, setting)
            except TooShort as error:
                log.warning("%s left out: %s", name, error)
                continue
            except ConfigError as error:
                if len(tasks) == 1:
                    raise
                log.warning("%s left out: %s", name, error)
                continue
            measured = accuracy(scores.tolist())
            if not measured.samples:
                log.warning("%s left out: it has no samples", name)
                continue
            results[name] = {
                "task": task.name,
                "length": setting.length,
                "accuracy": measured.mean,
                "low": measured.low,
                "high": measured.high,
                "samples": measured.samples,
                "chance": chance,
                "source": task.source,
                "seconds": round(time.perf_counter() - began, 2),
                "identity": identity,
            }
            done(results)
    return results


def _identity(subject: Subject, task: Task, setting: Setting) -> dict[str, Any]:
    """What two equal measurements have in common."""
    tokens = subject.tokenizer.fingerprint if subject.tokenizer and task.text else None
    return {
        "step": subject.step,
        "samples": setting.samples,
        "seed": setting.seed,
        "tokenizer": tokens,
        "haystack": setting.haystack.fingerprint if task.text else None,
        "data_dir": setting.data_dir,
    }


def read(path: Path) -> dict[str, Result]:
    """The results in ``path``, {} when there is none; RunError for a file that is not one of results."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text())["results"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: is not a file of results ({error!r}); remove it to start anew.") from error


def write(path: Path, results: dict[str, Result], about: dict[str, Any]) -> None:
    """Replaces ``path`` in one step, so that a killed run loses nothing that was there."""
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")
    os.replace(whole, path)


def metrics(results: Iterable[tuple[str, Result]]) -> dict[str, float]:
    """Flat numbers for logging: eval/task@length."""
    return {f"eval/{name}": r["accuracy"] for name, r in results if math.isfinite(r["accuracy"])}
