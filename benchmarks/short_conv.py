"""The short convolution with SiLU on one GPU: kernels and XLA against the bytes; errors against float32.

    python -m benchmarks.short_conv [--shape 8,4096,2048] [--taps 4] [--backends hopper,triton,xla]

The floor reads x and writes y (forward), reads x and dy and writes dx (backward), once, at 3.0 TB/s. bf16,
documents of 300 tokens on average. One JSON line a backend: milliseconds (medians of 5 groups of calls),
relative RMS errors, and whether two runs gave the same bits.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp

from benchmarks.peers import median_ms
from pallas_kernels import auto_means, short_conv

BYTES_PER_SECOND = 3.0e12


def forward(x: jax.Array, kernel: jax.Array, positions: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    return (short_conv(x, kernel, positions, silu=True),)


def backward(x: jax.Array, kernel: jax.Array, positions: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    run = lambda x, kernel: short_conv(x, kernel, positions, silu=True)
    return jax.vjp(run, x, kernel)[1](dy.astype(x.dtype))


def error(got: jax.Array, want: jax.Array) -> float:
    return float(jnp.linalg.norm(jnp.ravel(got - want)) / jnp.linalg.norm(jnp.ravel(want)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=lambda s: [int(n) for n in s.split(",")], default=[8, 4096, 2048])
    parser.add_argument("--taps", type=int, default=4)
    parser.add_argument("--backends", type=lambda s: s.split(","), default=["auto", "xla"])
    args = parser.parse_args()
    batch, length, features = args.shape
    keys = jax.random.split(jax.random.key(0), 4)
    x, dy = (jax.random.normal(key, args.shape, jnp.bfloat16) for key in keys[:2])
    kernel = jax.random.uniform(keys[2], (args.taps, features), jnp.float32, -0.5, 0.5)
    at = jnp.arange(length)
    starts = jnp.where(jax.random.bernoulli(keys[3], 1 / 300, (batch, length)), at, 0)
    positions = at - jax.lax.cummax(starts, axis=1)
    passes = {"forward": forward, "backward": backward}
    exact = {name: jax.jit(f)(x.astype(jnp.float32), kernel, positions, dy) for name, f in passes.items()}
    for backend in args.backends:
        row: dict = {"shape": args.shape, "taps": args.taps, "backend": backend}
        for name, f in passes.items():
            with auto_means(backend):
                run = functools.partial(jax.jit(functools.partial(f)), x, kernel, positions, dy)
                out, again = run(), run()
                # Still inside: the backend is part of the key of jax's caches.
                row[f"{name}_ms"] = round(median_ms(run, jax.block_until_ready), 4)
            moved = (2 if name == "forward" else 3) * x.nbytes
            row[f"{name}_floor_ms"] = round(moved / BYTES_PER_SECOND * 1e3, 4)
            row[f"{name}_errors"] = [f"{error(*pair):.1e}" for pair in zip(out, exact[name], strict=True)]
            row["same_bits"] = row.get("same_bits", True) and jax.tree.all(
                jax.tree.map(jnp.array_equal, out, again)
            )
        print(json.dumps(row, default=bool))


if __name__ == "__main__":
    main()
