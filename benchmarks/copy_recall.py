"""Recall that is not all or nothing: how much of a random string a model of text still has at the end.

    python -m benchmarks.copy_recall --output=copies.json [--source text/val.jsonl] runs/a runs/b ...

A row begins with 1 or 8 lines of 64 random hexadecimal digits; prose (`eval.haystack`) fills it up to its
length; then the first 16 digits of one line come again and the other 48 are scored. A model that keeps
nothing pays 4 bits a digit or more, one that copies pays 0. With --source the same is measured of stretches
of held-out text, too, which a model of text continues better than it guesses. So each row is scored once more
with other lines in place of the stored ones: what it saves to have seen the line is recall alone.
The rows are the same for every model of bytes.
Exact: share of rows in which each of the 48 digits is the most probable. Intervals: 95%, over rows.
"""

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.vmapped import row
from eval import haystack, statistics, subject
from eval.subject import Subject
from hybridlm import untrusted

DIGITS, CUE = 64, 16
SHOWN = ("bits", "half"), ("saved", "saved_half")
Pair = tuple[list[int], list[int]]


def read(source: str) -> str:
    """The text of a JSONL file's documents, without what is not ASCII: a character is a byte."""
    documents = untrusted.read_bytes(Path(source), "--source").decode().split("\n")
    texts = (json.loads(one)["text"] for one in documents if one.strip())
    return "\n".join(text.encode("ascii", "ignore").decode() for text in texts)


def pairs(
    tested: Subject, length: int, lines: int, samples: int, text: str = "", seen: bool = True
) -> list[Pair]:
    """(context, the digits that follow) of each row of about ``length`` tokens.

    text: what the lines are taken from, in place of digits.  seen: False stores others than the one asked.
    """
    encode, prose = tested.text_tokenizer.encode, haystack.load().text(2 * length)
    made = []
    for index in range(samples):
        rng = random.Random(f"{length} {lines} {index}")
        stored = _lines(rng, lines, text)
        asked, start = rng.choice(stored), rng.randrange(length)
        stored = stored if seen else _lines(rng, lines, text)
        before = tested.encode("\n".join(stored) + "\n")
        fill = encode(prose[start : start + length])[: max(0, length - len(before) - DIGITS - 2)]
        made.append(([*before, *fill, *encode("\n" + asked[:CUE])], encode(asked[CUE:])))
    return made


def _lines(rng: random.Random, count: int, text: str) -> list[str]:
    if not text:
        return ["".join(rng.choices("0123456789abcdef", k=DIGITS)) for _ in range(count)]
    starts = [rng.randrange(len(text) - DIGITS) for _ in range(count)]
    return [text[start : start + DIGITS] for start in starts]


def measure(tested: Subject, length: int, lines: int, samples: int, text: str = "") -> dict[str, Any]:
    rows = [pairs(tested, length, lines, samples, text, seen) for seen in (True, False)]
    scored = tested.log_likelihoods([*rows[0], *rows[1]])
    every = np.array([-total for total, _ in scored]) / np.log(2) / (DIGITS - CUE)
    bits, unseen = every.reshape(2, samples)
    exact = statistics.accuracy([float(greedy) for _, greedy in scored[:samples]])
    half = lambda values: (1.96 * values.std(ddof=1) / np.sqrt(samples)).item()
    return {
        "length": length, "lines": lines, "samples": samples, "of": "text" if text else "digits",
        "bits": bits.mean().item(), "half": half(bits), "unseen": unseen.mean().item(),
        "saved": (unseen - bits).mean().item(), "saved_half": half(unseen - bits),
        "exact": float(exact[0]), "exact_low": float(exact[1]), "exact_high": float(exact[2]),
        "each": np.round(bits, 4).tolist(), "each_unseen": np.round(unseen, 4).tolist(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--lengths", default="1024,4096")
    parser.add_argument("--lines", default="1,8")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--source", default="", help="a JSONL file of text")
    parser.add_argument("--output", default="copy_recall.json")
    flags = parser.parse_args()
    texts = ["", *([read(flags.source)] if flags.source else [])]
    found: dict[str, list[dict[str, Any]]] = {}
    print(row("run", "of", "tokens", "lines", "bits a digit", "saved by having seen", "exact (95%)"))
    for workdir in flags.workdirs:
        tested = subject.load(workdir)
        lengths, every = (map(int, given.split(",")) for given in (flags.lengths, flags.lines))
        for length, lines, text in itertools.product(lengths, every, texts):
            one = measure(tested, length, lines, flags.samples, text)
            found.setdefault(Path(workdir).name, []).append(one)
            exact = f"{one['exact']:.3f} ({one['exact_low']:.3f} to {one['exact_high']:.3f})"
            bits, saved = (f"{one[a]:.3f} +- {one[b]:.3f}" for a, b in SHOWN)
            print(row(Path(workdir).name, one["of"], length, lines, bits, saved, exact), flush=True)
        Path(flags.output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
