"""Softmax attention within packed documents on one GPU: how cuDNN is told of them, what it costs, what leaks.

    python -m benchmarks.documents [--dims 64,128,256] [--batch 4] [--length 4096] [--mean 512] [--most 16,64]

none: one document a row, which is what documents should not cost.  one: the same, found out from the data.
codes: extra channels of q and k.  packed n: every document a sequence of its own, prepared for n a row.
auto: what the data choose.
xla: blockwise. bf16, heads * dim = 2048, of k and v one in --group.

A row a path: microseconds on the device, forward and forward + backward (means of 5 calls), bytes of
temporaries, the relative RMS error of o, dq, dk, dv against float32, and leaks: how many numbers of o behind
the first document change when it changes, and how many of its gradients are not 0 if only others have a loss.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_profile
from pallas_kernels.softmax_attention import cudnn, xla
from pallas_kernels.softmax_attention.call import AttentionCall

CALLS = 5


def error(got: jax.Array, want: jax.Array) -> float:
    return float(jnp.linalg.norm(jnp.ravel(got.astype(want.dtype) - want)) / jnp.linalg.norm(jnp.ravel(want)))


def passes(path: Callable, starts: jax.Array | None, dim: int) -> tuple[Callable, Callable]:
    """(o, (o, dq, dk, dv)) of q, k, v and, for the second, do."""
    run = lambda q, k, v: path(AttentionCall(q, k, v, starts, dim**-0.5))

    def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple[jax.Array, ...]:
        o, pull = jax.vjp(run, q, k, v)
        return (o, *pull(do.astype(o.dtype)))

    return jax.jit(run), jax.jit(both)


def measure(path: Callable, arrays: list, starts: jax.Array | None, end: int, exact: Any) -> str:
    """A row; ``end``: of the first document of the first row."""
    q, k, v, do = arrays
    forward, both = passes(path, starts, q.shape[-1])
    compiled = both.lower(q, k, v, do).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
    out = compiled(q, k, v, do)
    times = [gpu_profile.microseconds(CALLS, functools.partial(forward, q, k, v))]
    times.append(gpu_profile.microseconds(CALLS, functools.partial(compiled, q, k, v, do)))
    row = f"{times[0]:9.1f} {times[1]:9.1f} {temporaries:8.1f} MiB"
    if starts is None or not jnp.any(starts):
        return row
    row += " ".join(f" {error(got, want):.1e}" for got, want in zip(out, exact, strict=True))
    other = (x.at[0, :end].multiply(-30) for x in (q, k, v))
    moved = jnp.sum(forward(*other)[0, end:] != out[0][0, end:])
    gradients = compiled(q, k, v, do.at[0, :end].set(0))[1:]
    leaked = sum(jnp.sum(g[0, :end] != 0) for g in gradients)
    return f"{row}  leaks {int(moved)} {int(leaked)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    numbers = lambda text: [int(n) for n in text.split(",")]
    parser.add_argument("--dims", type=numbers, default=[64, 128, 256])
    parser.add_argument("--most", type=numbers, default=[16, 64])
    for name, default in (("batch", 4), ("length", 4096), ("mean", 512), ("group", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--paths", default="none,one,codes,packed,auto,xla")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    starts = rng.random((args.batch, args.length)) < 1 / args.mean
    starts[:, 0], starts[0, args.mean] = False, True
    most_there, end = 1 + starts.sum(1).max(), int(np.argmax(starts[0]))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; at most {most_there} documents a row")
    print("dim path: forward us, forward + backward us, temporaries, errors of o dq dk dv, leaks")
    available: dict[str, Callable] = {"none": cudnn.softmax_attention, "one": cudnn.softmax_attention}
    available |= {"codes": cudnn.coded, "auto": cudnn.softmax_attention}
    available |= {f"packed {n}": functools.partial(cudnn.packed, most=n) for n in args.most}
    available |= {"xla": xla.softmax_attention}
    for dim in args.dims:
        keys = jax.random.split(jax.random.key(dim), 4)
        heads = [2048 // dim // share for share in (1, args.group, args.group, 1)]  # of q, k, v, do
        arrays = [
            jax.random.normal(key, (args.batch, args.length, n, dim), jnp.bfloat16)
            for key, n in zip(keys, heads, strict=True)
        ]
        wide = [x.astype(jnp.float32) for x in arrays]
        exact = passes(xla.softmax_attention, jnp.asarray(starts), dim)[1](*wide)
        for name, path in available.items():
            if name.split()[0] not in args.paths.split(","):
                continue
            try:
                here = {"none": None, "one": jnp.zeros_like(starts)}.get(name, jnp.asarray(starts))
                row = measure(path, arrays, here, end, exact)
            except Exception as reason:
                row = f"{type(reason).__name__}: {str(reason)[:160]}"
            print(f"{dim:4d} {name:10s} {row}", flush=True)


if __name__ == "__main__":
    main()
