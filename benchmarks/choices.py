"""Times what `pallas_kernels/hopper/table.py` chooses between: the slice of V and the pieces of a sequence.

    python benchmarks/choices.py [--ops gated_deltanet,simple_gla] [--shapes 0,1,2,3,4]

Shapes, inputs and medians of benchmarks/kernels.py; forward, then forward and backward. One line a choice,
the table's own marked. Needs a Hopper GPU.
"""

import argparse
import functools
import itertools
from typing import Any

import jax
from kernels import SHAPES
from peers import Jax, median_ms

from pallas_kernels.hopper import table
from pallas_kernels.hopper.table import Choice


def candidates(shape: tuple[int, ...]) -> list[Choice]:
    _, T, _, D = shape
    tiles, pieces = (
        [tile for tile in (64, 128) if D % tile == 0],
        [n for n in (1, 2, 4, 8, 16) if T // n >= 4096],
    )
    return [Choice(*choice) for choice in itertools.product(tiles, pieces)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", type=lambda s: s.split(","), default=["gated_deltanet", "simple_gla"])
    parser.add_argument("--shapes", type=lambda s: [int(i) for i in s.split(",")], default=range(len(SHAPES)))
    args = parser.parse_args()
    ours = Jax("ours")
    chosen = table.forward, table.backward
    for op, index in itertools.product(args.ops, args.shapes):
        B, T, H, D = shape = SHAPES[index]
        x = jax.jit(functools.partial(ours.draw, op, shape))()
        for choice in candidates(shape):
            additive = Choice(D, choice.pieces)  # its backward pass takes all values at once

            def backward(*arguments: Any, choice: Choice = choice, additive: Choice = additive) -> Choice:
                return choice if arguments[-1] else additive

            table.forward, table.backward = (lambda *_, choice=choice: choice), backward
            jax.clear_caches()
            times = []
            for function in (ours.forward(op), ours.both(op)):
                run = functools.partial(jax.jit(function), x)
                times.append(median_ms(run, jax.block_until_ready))
            table.forward, table.backward = chosen
            here = ((B, T, H, D), (B, T, H, D))
            mark = " forward" * (choice == table.forward(*here))
            mark += " backward" * (op == "simple_gla" and additive == table.backward(*here, False))
            print(
                f"{op} {shape} {choice}: {times[0]:.3f} {times[1]:.3f} ms{mark and ' <- table,' + mark}",
                flush=True,
            )


if __name__ == "__main__":
    main()
