"""Recall that is not all or nothing: how much of a random string a model of text still has at the end.

    python -m benchmarks.copy_recall --output=copies.json runs/a runs/b ...

A row begins with 1 or 8 lines of 64 random hexadecimal digits; prose (`eval.haystack`) fills it up to its
length; then the first 16 digits of one line come again and the other 48 are scored. A model that keeps
nothing pays 4 bits a digit or more, one that copies pays 0. The rows are the same for every model of bytes.
Exact: share of rows in which each of the 48 digits is the most probable. Intervals: 95%, over rows.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.vmapped import row
from eval import haystack, statistics, subject
from eval.subject import Subject

DIGITS, CUE = 64, 16
Pair = tuple[list[int], list[int]]


def pairs(tested: Subject, length: int, lines: int, samples: int) -> list[Pair]:
    """(context, the digits that follow) of each row of about ``length`` tokens."""
    encode, prose = tested.text_tokenizer.encode, haystack.load().text(2 * length)
    made = []
    for index in range(samples):
        rng = random.Random(f"{length} {lines} {index}")
        stored = ["".join(rng.choices("0123456789abcdef", k=DIGITS)) for _ in range(lines)]
        asked, start = rng.choice(stored), rng.randrange(length)
        before = tested.encode("\n".join(stored) + "\n")
        fill = encode(prose[start : start + length])[: max(0, length - len(before) - DIGITS - 2)]
        made.append(([*before, *fill, *encode("\n" + asked[:CUE])], encode(asked[CUE:])))
    return made


def measure(tested: Subject, length: int, lines: int, samples: int) -> dict[str, Any]:
    scored = tested.log_likelihoods(pairs(tested, length, lines, samples))
    bits = np.array([-total for total, _ in scored]) / np.log(2) / (DIGITS - CUE)
    exact = statistics.accuracy([float(greedy) for _, greedy in scored])
    half = 1.96 * bits.std(ddof=1) / np.sqrt(samples)
    return {
        "length": length, "lines": lines, "samples": samples, "bits": bits.mean().item(), "half": half.item(),
        "exact": float(exact[0]), "exact_low": float(exact[1]), "exact_high": float(exact[2]),
        "each": np.round(bits, 4).tolist(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--lengths", default="1024,4096")
    parser.add_argument("--lines", default="1,8")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--output", default="copy_recall.json")
    flags = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    print(row("run", "tokens", "lines", "bits a digit", "exact (95%)"))
    for workdir in flags.workdirs:
        tested = subject.load(workdir)
        for length in map(int, flags.lengths.split(",")):
            for lines in map(int, flags.lines.split(",")):
                one = measure(tested, length, lines, flags.samples)
                found.setdefault(Path(workdir).name, []).append(one)
                exact = f"{one['exact']:.3f} ({one['exact_low']:.3f} to {one['exact_high']:.3f})"
                bits = f"{one['bits']:.3f} +- {one['half']:.3f}"
                print(row(Path(workdir).name, length, lines, bits, exact), flush=True)
        Path(flags.output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
