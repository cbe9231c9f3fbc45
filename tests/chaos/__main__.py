"""Breaks small real runs at random, and holds every one against a run that nothing happened to.

    python -m tests.chaos --minutes 20 --seed 0
    python -m tests.chaos --only "W&B fails;killed in eval"     # each of these once; --list names all

A trial starts train.py in a folder of its own, injects one to three faults, each in its own start, and then
lets the run finish. It passes if every faulty start ended as that fault should end (resumable, or refused
with the right error) and metrics.jsonl equals the undisturbed run's, bit for bit. Anything else is "lost".
Faults of the disk need root, for a small tmpfs; without it they are left out. A seed and a trial's number
decide its faults; when exactly they strike is up to the machine.
"""

import argparse
import itertools
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.chaos.faults import FAULTS, fitting
from tests.chaos.trial import KINDS, Corpus, Trial
from tests.flags import FAST


def choose(number: int, chance: random.Random, only: list[str]) -> tuple[str, list[str]]:
    """(kind, faults) of trial ``number``; with ``only``, the one of these whose turn it is."""
    fits = {kind: fitting(kind, os.geteuid() == 0) for kind in KINDS}
    if only:
        name = only[number % len(only)]
        return next(kind for kind in KINDS if name in fits[kind]), [name]
    if number % 12 == 6:
        return KINDS[-1], [fits[KINDS[-1]][number // 12 % len(fits[KINDS[-1]])]]
    kind = KINDS[number % 3]
    names = fits[kind]
    chosen = [names[number // 3 % len(names)], *chance.choices(names, k=chance.choice((0, 0, 1, 1, 2)))]
    return kind, chosen[:1] if chosen.count("disk full or read-only") > 1 else chosen


def attempt(corpus: Corpus, number: int, seed: int, only: list[str]) -> tuple[list[tuple[str, bool]], str]:
    """Trial ``number``: (its faults, with whether each was refused; what went wrong)."""
    chance = random.Random(f"{seed} {number}")
    kind, chosen = choose(number, chance, only)
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
    parser.add_argument("--only", default="", metavar="FAULT;...", help="these, once each")
    parser.add_argument("--list", action="store_true", help="the faults, and exit")
    parser.add_argument("--jobs", type=int, default=2, help="trials at the same time")
    parser.add_argument("--folder", type=Path, help="where; default: a new one, removed if nothing is lost")
    flags = parser.parse_args()
    if flags.list:
        print("\n".join(FAULTS))
        return 0
    only = [name for name in flags.only.split(";") if name]
    if unknown := set(only) - {name for kind in KINDS for name in fitting(kind, os.geteuid() == 0)}:
        parser.error(f"--only: none of the faults here: {', '.join(sorted(unknown))}")
    begun = time.monotonic()
    folder = flags.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(exist_ok=True)
    os.environ.setdefault("XLA_FLAGS", FAST)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    corpus = Corpus(folder)
    until = time.monotonic() + 60 * flags.minutes
    injected, refused, lost = Counter[str](), Counter[str](), Counter[str]()
    numbers, trials = itertools.count(), []

    def work() -> None:
        while time.monotonic() < until and ((number := next(numbers)) < len(only) or not only):
            done, wrong = attempt(corpus, number, flags.seed, only)
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
    for name, moments in sorted(corpus.moments.items()):
        print(f"\nkilled in {name}: " + "; ".join(f"{where} ({n})" for where, n in sorted(moments.items())))
    print(f"\n{count - total} of {count} trials ended on the undisturbed run's metrics")
    if not total and not flags.folder:
        shutil.rmtree(folder)
    return int(total > 0 or not trials)


if __name__ == "__main__":
    sys.exit(main())
