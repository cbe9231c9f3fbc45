"""The single-token step of decoding on one GPU: time against the bytes of the state.

    python -m benchmarks.step [--batches 1,8,32,128] [--backends triton,xla]

--steps tokens run in one compiled loop whose state is donated, as in generation; H 16, K = V = 128, bf16 q,
k, v, a float32 state, Gated DeltaNet and KDA (q, k normalised). The floor reads and writes the state once a
step at 3.0 TB/s. One JSON line a batch size, op and backend (auto: the kernel).
"""

import argparse
import functools
import itertools
import json
import time

import jax
import jax.numpy as jnp

from pallas_kernels import auto_means, linear_attention_step

HEADS, DIM = 16, 128
BYTES_PER_SECOND = 3.0e12


@functools.partial(jax.jit, static_argnames=("steps", "backend"), donate_argnames="state")
def decode(
    state: jax.Array, x: dict[str, jax.Array], steps: int, backend: str
) -> tuple[jax.Array, jax.Array]:
    def step(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, state = carry  # the output is the next query, so that no step can be left out
        return linear_attention_step(
            q, x["k"], x["v"], state=state, log_decay=x["log_decay"], beta=x["beta"], qk_l2norm=True
        )

    with auto_means(backend):
        return jax.lax.fori_loop(0, steps, step, (x["v"], state))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=lambda s: [int(b) for b in s.split(",")], default=[1, 8, 32, 128])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--backends", type=lambda s: s.split(","), default=["auto", "xla"])
    args = parser.parse_args()
    for batch in args.batches:
        keys = iter(jax.random.split(jax.random.key(0), 4))
        normal = lambda *shape, keys=keys: jax.random.normal(next(keys), shape)
        x = {name: normal(batch, HEADS, DIM).astype(jnp.bfloat16) for name in ("k", "v")}
        x["beta"] = jax.nn.sigmoid(normal(batch, HEADS))
        gate = jax.nn.log_sigmoid(normal(batch, HEADS, DIM))
        floor = 2 * 4 * batch * HEADS * DIM * DIM / BYTES_PER_SECOND * 1e6
        gates = {"gated_deltanet": gate[..., 0], "kda": gate}
        for op, backend in itertools.product(gates, args.backends):
            times = []
            state = jnp.zeros((batch, HEADS, DIM, DIM))
            for _ in range(4):
                start = time.perf_counter()
                o, state = decode(state, x | {"log_decay": gates[op]}, args.steps, backend)
                jax.block_until_ready((o, state))
                times.append((time.perf_counter() - start) / args.steps * 1e6)
            us = sorted(times[1:])[1]
            row = {"op": op, "backend": backend, "batch": batch, "step_us": us, "floor_us": floor}
            row["ratio"] = us / floor
            print(json.dumps({n: round(v, 2) if isinstance(v, float) else v for n, v in row.items()}))


if __name__ == "__main__":
    main()
