"""The ops beside the recurrence on one GPU, kernels and XLA, against the bytes that they must move.

    python -m benchmarks.ops short_conv [--shapes 8,4096,2048] [--backends hopper,triton,xla]
    python -m benchmarks.ops elementwise [--shapes 8,4096,1024 1,65536,1024] [--backends auto,xla]

short_conv: 4 taps and SiLU. elementwise: the recurrence of a number a channel. Documents of 300 tokens on
average. The floor reads x (and the gates) and writes what comes out, then reads what the gradients are made
of and writes them, once, at 3.0 TB/s. A row for each shape, dtype and backend: microseconds on the device
(means of 10 calls, all kernels of a call together), percent of the floor, the largest relative RMS error of
results and gradients against XLA's in float32, and whether two runs gave the same bits.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import gpu_profile
from pallas_kernels import auto_means, elementwise_recurrence, short_conv

BYTES_PER_SECOND = 3.0e12
SHAPES = ("8,4096,1024", "8,4096,2048", "4,2048,1024", "2,16384,2048", "1,65536,1024")
CALLS = 10


class Op(NamedTuple):
    """run: (x, a parameter or gates, where documents start [B, T]) -> y.  second: draws the second for x.

    moved: arrays as large as x, of the forward pass and of both.
    """

    run: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    second: Callable[[jax.Array, tuple[int, ...]], jax.Array]
    moved: tuple[int, int]


def convolved(x: jax.Array, kernel: jax.Array, starts: jax.Array) -> jax.Array:
    at = jnp.arange(x.shape[1])
    return short_conv(x, kernel, at - jax.lax.cummax(jnp.where(starts, at, 0), axis=1), silu=True)


def recurred(x: jax.Array, log_decay: jax.Array, starts: jax.Array) -> jax.Array:
    return elementwise_recurrence(x, log_decay, segment_ids=jnp.cumsum(starts, axis=1))[0]


OPS = {
    "short_conv": Op(
        convolved, lambda key, shape: jax.random.uniform(key, (4, shape[-1]), minval=-0.5, maxval=0.5), (2, 5)
    ),
    "elementwise": Op(
        recurred, lambda key, shape: -0.1 * jnp.abs(jax.random.normal(key, shape)), (3, 8)
    ),
}  # fmt: skip


def passes(op: Op) -> tuple[Callable, Callable]:
    """Of (x, second, starts, dy): (y,) and (y, dx, dsecond)."""

    def both(x: jax.Array, second: jax.Array, starts: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda x, second: op.run(x, second, starts), x, second)
        return y, *pull(dy.astype(y.dtype))

    return jax.jit(lambda x, second, starts, dy: (op.run(x, second, starts),)), jax.jit(both)


def error(got: Any, want: Any) -> float:
    norm = lambda a: jnp.linalg.norm(jnp.ravel(a.astype(jnp.float32)))
    return max(float(norm(a.astype(jnp.float32) - b) / norm(b)) for a, b in zip(got, want, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--backends", type=lambda s: s.split(","), default=["auto", "xla"])
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(
        "shape dtype backend | forward us, % of floor | forward + backward us, % of floor | error, same bits"
    )
    op = OPS[args.op]
    for shape, dtype in itertools.product(args.shapes, (jnp.bfloat16, jnp.float32)):
        size = tuple(int(n) for n in shape.split(","))
        keys = jax.random.split(jax.random.key(0), 4)
        x, dy = (jax.random.normal(key, size).astype(dtype) for key in keys[:2])
        second = op.second(keys[2], size)
        second = second.astype(dtype) if second.shape == size else second
        starts = jax.random.bernoulli(keys[3], 1 / 300, size[:2]).at[:, 0].set(False)
        with auto_means("xla"):
            wide = (a.astype(jnp.float32) for a in (x, second))
            want = passes(op)[1](*wide, starts, dy.astype(jnp.float32))
        for backend in args.backends:
            row, same = f"{shape} {jnp.dtype(dtype).name} {backend:>9}", True
            try:
                for run, moved in zip(passes(op), op.moved, strict=True):
                    with auto_means(backend):  # which is part of the key of jax's caches
                        call = functools.partial(run, x, second, starts, dy)
                        us, out = gpu_profile.microseconds(CALLS, call), call()
                        same &= jax.tree.all(jax.tree.map(jnp.array_equal, out, call()))
                    row += f" | {us:8.1f} {100 * moved * x.nbytes / BYTES_PER_SECOND * 1e6 / us:5.1f}"
                row += f" | {error(out, want):.1e} {bool(same)}"
            except ValueError as refused:  # kernels of another dtype
                row += f" | {refused}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
