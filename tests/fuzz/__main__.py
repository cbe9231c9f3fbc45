"""python -m tests.fuzz: see the package."""

import argparse
import logging
import sys
import time

from tests.fuzz import KINDS, fuzz


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz")
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: %(default)s")
    parser.add_argument("--cases", type=int, default=200, help="of each kind; default: %(default)s")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=float, default=0.1, help="part of the valid configs that is traced")
    parser.add_argument("--compile", type=float, default=0.03, help="part of those that runs a step")
    flags = parser.parse_args()
    logging.getLogger("hybridlm").setLevel(logging.CRITICAL)
    wrong: list[str] = []
    print("| kind | cases | outcomes | wrong | seconds |\n|---|---|---|---|---|", flush=True)
    for kind in flags.kinds.split(","):
        began = time.monotonic()
        options = {"trace": flags.trace, "compile": flags.compile} if kind == "configs" else {}
        outcomes, found = fuzz(kind, flags.cases, flags.seed, flags.first, **options)
        said = ", ".join(f"{n:,} {outcome}" for outcome, n in outcomes.most_common())
        row = (kind, f"{outcomes.total():,}", said, len(found), f"{time.monotonic() - began:.0f}")
        print("|", " | ".join(map(str, row)), "|", flush=True)
        wrong += found
        print("\n".join(found), end="\n" if found else "", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
