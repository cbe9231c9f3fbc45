"""Times what `linear_attention/hopper/table.py` chooses between: slices of V, pieces, short walks.

    python benchmarks/choices.py [--ops gated_deltanet,simple_gla] [--shapes 0,1,2,3,4] [--pieces 1,8]

Shapes, inputs and medians of benchmarks/kernels.py; forward, then forward and backward. Everything compiles
first, on all cores. One line a choice, the table's own marked; with a decay also "walks", pieces that forget
walked in part, and per key channel led (hopper/warm_up.py). Needs a Hopper GPU.
"""

import argparse
import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from kernels import INDICES, NAMED, SHAPES, some_of
from peers import OPS, Jax, Shape, channel, delta, median_ms, shapes_of

from pallas_kernels.linear_attention.hopper import table
from pallas_kernels.linear_attention.hopper.table import Choice

PIECES = ("1", "2", "4", "8", "16")


def candidates(op: str, shape: Shape, wanted: list[int]) -> list[tuple[Choice, bool]]:
    """Choices, and whether with short walks."""
    tiles = [tile for tile in (64, 128) if shape.value_dim % tile == 0]
    pieces = [n for n in wanted if n == 1 or shape.tokens % (64 * n) == 0]
    choices = [(Choice(*choice), False) for choice in itertools.product(tiles, pieces)]
    cut = [choice for choice, _ in choices if choice.pieces > 1]
    choices += [(choice, True) for choice in cut if op != "deltanet"]
    choices += [(Choice(tile, led=n), False) for tile, n, _ in cut if channel(op)]
    return choices


def additive(choice: Choice, shape: Shape) -> Choice:
    """The additive backward pass takes all values of a head at once."""
    return Choice(shape.value_dim, choice.pieces)


def lower(function: Callable, x: Any, shape: Shape, choice: Choice, short: bool) -> Any:
    """The function with this choice in place of the table's."""
    chosen = table.forward, table.backward, table.SHORT_WALKS
    table.forward = lambda *_: choice
    table.backward = lambda *call: choice if call[-1] else additive(choice, shape)
    table.SHORT_WALKS = short
    try:
        return jax.jit(function).lower(x)
    finally:
        table.forward, table.backward, table.SHORT_WALKS = chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", type=some_of(OPS), default=["gated_deltanet", "simple_gla"])
    parser.add_argument("--shapes", type=some_of(INDICES), default=NAMED["squares"])
    parser.add_argument("--pieces", type=some_of(PIECES), default=PIECES)
    args = parser.parse_args()
    ours = Jax("ours")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = []
        for op, index in itertools.product(args.ops, args.shapes):
            shape = SHAPES[int(index)]
            draw = functools.partial(ours.draw, op, shape)
            x = jax.eval_shape(draw)
            for choice in candidates(op, shape, list(map(int, args.pieces))):
                programs = [lower(f, x, shape, *choice) for f in (ours.forward(op), ours.both(op))]
                waiting.append((op, shape, draw, choice, [pool.submit(p.compile) for p in programs]))
        compiled = [(*rest, [f.result() for f in futures]) for *rest, futures in waiting]
    for op, shape, draw, (choice, short), programs in compiled:
        x = jax.jit(draw)()
        times = [median_ms(functools.partial(run, x), jax.block_until_ready) for run in programs]
        sizes = shapes_of(op, shape)
        mark = " forward" * (choice == table.forward(sizes["k"], sizes["v"]))
        backward = choice if delta(op) else additive(choice, shape)
        mark += " backward" * (backward == table.backward(sizes["k"], sizes["v"], delta(op)))
        mark = f" <- table,{mark}" * bool(mark) * (short == table.SHORT_WALKS)
        print(f"{op} {shape} {choice}{short * ' walks'}: {times[0]:.3f} {times[1]:.3f} ms{mark}", flush=True)


if __name__ == "__main__":
    main()
