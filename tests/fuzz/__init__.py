"""Damaged and odd inputs of every kind: each is refused in a line, or is what it was.

    python -m tests.fuzz --cases 500 --seed 0                     # of each kind
    python -m tests.fuzz --kinds configs,records --cases 2000 --trace 0.1 --compile 0.03

A kind is a module's ``cases(folder, ...)``, which prepares what is sound and returns the function of one
case: from a source of randomness to what became of it. Wrong is any other exception than a ConfigError or
RunError, a message of several lines or with escapes, more than SECONDS of the processor or WAITED of the
clock (the machine may be busy), or nonsense that was accepted: what a case asserts. A case is a function of
its kind, the seed and its number.
"""

import random
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hybridlm.errors import ConfigError, RunError
from hybridlm.pattern import PatternError
from tests.fuzz import data, folders, patterns, records, settings, sweeps

SECONDS, WAITED = 60, 1200
Case = Callable[[random.Random], str]
KINDS: dict[str, Callable[..., Case]] = {
    "configs": settings.cases,
    "patterns": patterns.cases,
    "inputs": partial(data.cases, "input"),
    "shards": partial(data.cases, "shards"),
    "tokenizers": partial(data.cases, "tokenizer"),
    "folders": folders.cases,
    "records": records.cases,
    "sweeps": sweeps.cases,
}


def late(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s of the processor, or {WAITED} s")


def fuzz(kind: str, cases: int, seed: int, first: int = 0, **options: Any) -> tuple[Counter, list[str]]:
    """(outcomes, reports of what was wrong) of cases ``first`` to ``first`` + ``cases``."""
    outcomes: Counter = Counter()
    wrong: list[str] = []
    for timer in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(timer, late)
    with tempfile.TemporaryDirectory() as folder:
        run = KINDS[kind](Path(folder), **options)
        for case in range(first, first + cases):
            outcome, problem = attempt(run, random.Random(f"{kind} {seed} {case}"))
            outcomes[outcome] += 1
            wrong += [f"{kind}, seed {seed}, case {case}: {problem}"] if problem else []
    return outcomes, wrong


def attempt(run: Case, chance: random.Random) -> tuple[str, str]:
    """(outcome, what was wrong, "" if nothing)."""
    signal.alarm(WAITED)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return run(chance), ""
    except (ConfigError, RunError) as error:
        said = str(error)
        odd = "\x1b" in said or ("\n" in said and not isinstance(error, PatternError))
        return "refused", f"a message of several lines or with escapes: {said!r}" if odd else ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return "wrong", f"{type(error).__name__}\n{traceback.format_exc(limit=-4)}"
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
