"""A chunk of a prompt against a long cache: ms of attention at the cache's start, middle and end.

    python -m benchmarks.prefill [--slots 131072,1048576] [--chunk 2048] [--heads 16] [--kv_heads 4]
        [--dim 128] [--dtype bfloat16]

Medians of 3 calls. slots: `over_slots`, which a prefill takes.  all: `blockwise`, which reads
every slot for every block of queries. The largest difference of both is printed, too.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.softmax_attention import blockwise, over_slots


def timed(path: Callable[..., jax.Array], *arrays: jax.Array) -> tuple[float, jax.Array]:
    """(ms, o)."""
    o = jax.block_until_ready(path(*arrays))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(path(*arrays))
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times), o


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slots", default="131072,1048576")
    for name, given in (("chunk", 2048), ("heads", 16), ("kv_heads", 4), ("dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=given)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    flags = parser.parse_args()
    paths = {
        name: jax.jit(functools.partial(path, scale=flags.dim**-0.5))
        for name, path in (("slots", over_slots), ("all", blockwise))
    }
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, flags.dtype)
    for size in map(int, flags.slots.split(",")):
        q = normal(0, 1, flags.chunk, flags.heads, flags.dim)
        k, v = (normal(seed, 1, size, flags.kv_heads, flags.dim) for seed in (1, 2))
        for start in (0, (size - flags.chunk) // 2, size - flags.chunk):
            places = start + jnp.arange(flags.chunk), jnp.zeros((1, flags.chunk), jnp.int32), jnp.arange(size)
            found, said = {}, []
            for name, path in paths.items():
                ms, found[name] = timed(path, q, k, v, *places)
                said.append(f"{name} {ms:.1f} ms")
            apart = float(jnp.max(jnp.abs(found["slots"] - found["all"])))
            print(f"{size:,} slots, chunk at {start:,}: {', '.join(said)}, {apart:.1e} apart", flush=True)


if __name__ == "__main__":
    main()
