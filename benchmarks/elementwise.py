"""The element-wise recurrence on one GPU: kernels by number of pieces, and XLA, against the bytes.

    python -m benchmarks.elementwise [--shapes 8,4096,1024 1,65536,1024] [--pieces 0,8] [--backends xla]

The floor reads x and g and writes h (forward), reads dh, g and h and writes dx and dg (backward), once, at
3.0 TB/s. Documents of 300 tokens on average. A row for each shape, dtype and number of pieces (0: as the
kernels choose): microseconds on the device (means of 10 calls, all kernels of a call together), percent of
the floor, and the largest relative RMS error of the results and gradients against XLA's in float32.
"""

import argparse
import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import gpu_profile
from pallas_kernels.elementwise import xla
from pallas_kernels.elementwise.call import make

BYTES_PER_SECOND = 3.0e12
SHAPES = ("8,4096,1024", "8,4096,2048", "4,2048,1024", "2,16384,2048", "1,65536,1024")
CALLS = 10


def passes(compute: Callable, starts: jax.Array) -> dict[str, Callable]:
    """Forward: (h, final).  Backward of what `jax.vjp` keeps: (dx, dlog_decay, dstate)."""
    run = lambda x, g, state: compute(make(x, g, starts, state))
    return {
        "forward": jax.jit(lambda x, g, state, dh: run(x, g, state)),
        "both": jax.jit(lambda x, g, state, dh: jax.vjp(run, x, g, state)[1]((dh, state))),
    }


def error(got: Any, want: Any) -> float:
    norms = lambda a, b: jnp.linalg.norm(jnp.ravel(a.astype(jnp.float32) - b)) / jnp.linalg.norm(jnp.ravel(b))
    return max(float(norms(*pair)) for pair in zip(got, want, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--pieces", type=lambda s: [int(n) for n in s.split(",")], default=[0])
    parser.add_argument("--backends", type=lambda s: s.split(","), default=["hopper", "xla"])
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("shape dtype pieces | forward us, % of floor | forward + backward us, % of floor | error")
    for shape in args.shapes:
        batch, length, features = size = tuple(int(n) for n in shape.split(","))
        keys = jax.random.split(jax.random.key(0), 5)
        x, g, dh = (jax.random.normal(key, size) for key in keys[:3])
        state, g = jax.random.normal(keys[3], (batch, features)), -0.1 * jnp.abs(g)
        starts = jax.random.bernoulli(keys[4], 1 / 300, (batch, length)).at[:, 0].set(False)
        for dtype in (jnp.bfloat16, jnp.float32):
            arrays = [array.astype(dtype) for array in (x, g)]
            given = (*arrays, state, dh.astype(dtype))
            exact = [a.astype(jnp.float32) for a in given]
            want = [passes(xla.elementwise_recurrence, starts)[name](*exact) for name in ("forward", "both")]
            chosen = {"xla": xla.elementwise_recurrence} if "xla" in args.backends else {}
            for name, n in itertools.product(args.backends, args.pieces):
                if name != "xla":
                    kernels = importlib.import_module(f"pallas_kernels.elementwise.{name}")
                    chosen[f"{name} {n}"] = functools.partial(
                        kernels.elementwise_recurrence, pieces=n or None
                    )
            for name, compute in chosen.items():
                row, errors = f"{shape} {jnp.dtype(dtype).name} {name:>9}", []
                for (which, run), expected in zip(passes(compute, starts).items(), want, strict=True):
                    us = gpu_profile.microseconds(CALLS, functools.partial(run, *given))
                    moved = (3 if which == "forward" else 8) * arrays[0].nbytes
                    row += f" | {us:8.1f} {100 * moved / BYTES_PER_SECOND * 1e6 / us:5.1f}"
                    errors.append(error(run(*given), expected))
                print(f"{row} | {max(errors):.1e}", flush=True)


if __name__ == "__main__":
    main()
