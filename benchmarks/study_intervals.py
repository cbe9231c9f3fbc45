"""Differences between the stacks of docs/studies/ratio.md, with intervals over seeds.

    python -m benchmarks.study_intervals
    python -m benchmarks.study_intervals --runs runs/others runs/seeds --copies copies.json [--write]

The first prints the tables from the CSVs beside the page. The second takes in finished runs of further sweeps
of study_lm_large.py and what `benchmarks.copy_recall` wrote of them; --write puts them into the CSVs.
Intervals: Student's t at 95% of the deviation within stacks, pooled over those with several seeds and taken
to be alike in the others.
"""

import argparse
import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks.vmapped import row
from launch.state import lines, status

LOSSES, RECALL = "ratio_lm_60m.csv", "ratio_recall_60m.csv"
PLACES = "places "  # before the stacks of that part, which read a third of the text
BOTTOM = f"{PLACES}gdn_3-1_0-1-2"
MIXERS = ("gdn", "kda", "hgrn2", "mamba2")
METRICS = ("bits a byte", "text at 1024", "digits at 1024", "text at 4096")
STEPS = (("6-1", "pure"), ("3-1", "6-1"), ("1-1", "3-1"))
Row = dict[str, str]
Stacks = Mapping[str, Sequence[float]]  # stack -> a number for each seed


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def label(point: Mapping[str, str]) -> tuple[str, str]:
    """(stack, seed) as the CSVs name them."""
    parts = [point[name] for name in ("mixer", "ratio", "placement") if point.get(name)]
    name = "_".join(parts).replace(":", "-").replace(",", "-")
    return (PLACES if point.get("placement") else "") + name, point["seed"]


def trained(workdir: Path) -> tuple[list[Row], dict[str, tuple[str, str]]]:
    """Rows of the losses of the finished runs of a sweep, and run -> (stack, seed) of them."""
    rows, known = [], {}
    for run in json.loads((workdir / "sweep.json").read_text())["runs"]:
        if status(workdir / run["name"], run["steps"]).state != "finished":
            continue
        stack, seed = known[run["name"]] = label(run["point"])
        rows += [
            {"run": stack, "seed": seed, "tokens": str(line["step"] * run["tokens"] // run["steps"]),
             "val_bpb": f"{line['val_bpb']:.5f}"}
            for line in lines(workdir / run["name"]) if "val_bpb" in line
        ]  # fmt: skip
    return rows, known


def copied(
    found: Mapping[str, Sequence[Mapping[str, Any]]], known: Mapping[str, tuple[str, str]]
) -> list[Row]:
    """Rows of what `copy_recall` measured, of the runs that are known."""
    given = (*((k, k) for k in ("of", "length", "bits")), ("bits_half", "half"), ("saved", "saved"),
             ("saved_half", "saved_half"), ("exact", "exact"))  # fmt: skip
    show = lambda value: str(round(value, 4) if isinstance(value, float) else value)
    return [
        {"run": known[name][0], "seed": known[name][1], **{to: show(one[of]) for to, of in given}}
        for name, every in found.items()
        for one in every
        if name in known
    ]


def joined(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """``new`` runs in place of those of the same stack and seed."""
    taken = {(one["run"], one["seed"]) for one in new}
    kept = [one for one in old if (one["run"], one["seed"]) not in taken]
    return kept + sorted(new, key=lambda one: (one["run"], one["seed"]))


def ends(
    losses: Sequence[Row], recall: Sequence[Row], places: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Metric -> stack -> a number for each seed, of the runs that read all of their text.

    places: of that part alone, or of all the others.
    """
    found: dict[str, dict[str, list[float]]] = {metric: {} for metric in METRICS}
    of = lambda rows: (one for one in rows if one["run"].startswith(PLACES) == places)
    for one in of(losses):
        if int(one["tokens"]) >= (20e6 if places else 60e6):
            found[METRICS[0]].setdefault(one["run"], []).append(float(one["val_bpb"]))
    for one in of(recall):
        if (metric := f"{one['of']} at {one['length']}") in found:
            found[metric].setdefault(one["run"], []).append(float(one["saved"]))
    return found


def pooled(stacks: Stacks) -> tuple[float, int]:
    """(deviation within stacks, its degrees of freedom); nan and 0 where no stack has two seeds."""
    squares = sum((x - sum(seeds) / len(seeds)) ** 2 for seeds in stacks.values() for x in seeds)
    freedom = sum(len(seeds) - 1 for seeds in stacks.values())
    return (math.sqrt(squares / freedom), freedom) if freedom else (math.nan, 0)


def difference(stacks: Stacks, pairs: Sequence[tuple[str, str]]) -> tuple[float, float] | None:
    """(mean, half of its interval) of first less second over ``pairs`` of stacks; None where one is not."""
    if not pairs or any(one not in stacks for pair in pairs for one in pair):
        return None
    deviation, freedom = pooled(stacks)
    mean = lambda name: sum(stacks[name]) / len(stacks[name])
    variance = sum(1 / len(stacks[one]) for pair in pairs for one in pair) / len(pairs) ** 2
    half = stats.t.ppf(0.975, freedom) * deviation * math.sqrt(variance) if freedom else math.nan
    return sum(mean(one) - mean(other) for one, other in pairs) / len(pairs), float(half)


def wanted(stacks: Stacks) -> dict[str, list[tuple[str, str]]]:
    """What the page asks: each mixer less attention, and what more full layers bring to all with both."""
    found = {f"{m} {r} less attention": [(f"{m}_{r}", "full_full")] for r in ("3-1", "pure") for m in MIXERS}
    for more, less in STEPS:
        both = [(f"{m}_{more}", f"{m}_{less}") for m in MIXERS if {f"{m}_{more}", f"{m}_{less}"} <= {*stacks}]
        found[f"{more} less {less}, mean of {len(both)}"] = both
    return {name: pairs for name, pairs in found.items() if pairs and {*sum(pairs, ())} <= {*stacks}}


def tables(found: Mapping[str, Stacks], asked: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Prints the stacks, and the differences that are asked for."""
    print(row("stack", *METRICS))
    for stack in sorted(found[METRICS[0]]):
        print(row(stack, *(", ".join(f"{x:.3f}" for x in found[m].get(stack, ())) for m in METRICS)))
    deviations = (f"{deviation:.4f} of {freedom}" for deviation, freedom in map(pooled, found.values()))
    print(row("deviation within, degrees of freedom", *deviations), "\n")
    print(row("difference", *METRICS))
    for name, pairs in asked.items():
        numbers = (difference(found[metric], pairs) for metric in METRICS)
        print(row(name, *(f"{n[0]:+.3f} +- {n[1]:.3f}" if n else "" for n in numbers)))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=Path, default=Path("docs/studies"), help="folder of the CSVs")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="workdirs of sweeps")
    parser.add_argument("--copies", type=Path, nargs="*", default=[], help="what copy_recall wrote")
    parser.add_argument("--write", action="store_true", help="put what is new into the CSVs")
    flags = parser.parse_args()
    known: dict[str, tuple[str, str]] = {}
    losses, recall = (read(flags.studies / name) for name in (LOSSES, RECALL))
    for workdir in flags.runs:
        rows, names = trained(workdir)
        known |= names
        losses = joined(losses, rows)
    for path in flags.copies:
        recall = joined(recall, copied(json.loads(path.read_text()), known))
    whole, placed = (ends(losses, recall, places) for places in (False, True))
    tables(whole, wanted(whole[METRICS[0]]))
    others = sorted({*placed[METRICS[0]]} - {BOTTOM})
    tables(placed, {f"{BOTTOM} less {one}": [(BOTTOM, one)] for one in others})
    for name, rows in ((LOSSES, losses), (RECALL, recall)) if flags.write else ():
        with (flags.studies / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
