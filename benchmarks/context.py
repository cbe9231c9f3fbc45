"""Gated DeltaNet's recurrence over the devices of `mesh.context`: one row, forward and backward.

    python -m benchmarks.context [--tokens=32768] [--heads=64] [--dim=128] [--devices=1,2,4]

bf16 q, k, v of [1, tokens, heads, dim], decays and beta per head. Medians of 5 groups of calls; the norms
of o and the gradients are those of one device if the pieces are right. One JSON line a number of devices.
"""

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.peers import median_ms
from hybridlm import schema, sharding
from hybridlm.linear_mixer import Inputs, recurrence
from hybridlm.rows import single_document


def measure(tokens: int, heads: int, dim: int, devices: int) -> dict[str, Any]:
    mesh = sharding.make_mesh(schema.Mesh(1, 1, 1, devices))
    with jax.set_mesh(mesh):
        keys = iter(jax.random.split(jax.random.key(0), 6))
        cut = jax.NamedSharding(mesh, jax.P(None, "context") if devices > 1 else jax.P())
        draw = lambda *shape: jax.device_put(jax.random.normal(next(keys), (1, tokens, heads, *shape)), cut)
        q, k, v, do = (draw(dim).astype(jnp.bfloat16) for _ in range(4))
        g, beta = -jax.nn.softplus(draw()), jax.nn.sigmoid(draw())
        rows = single_document(1, tokens)
        forward = jax.jit(lambda *x: recurrence(Inputs(*x), rows, qk_l2norm=True)[0])

        @jax.jit
        def both(do: jax.Array, *x: jax.Array) -> tuple:
            o, pull = jax.vjp(forward, *x)
            return o, *pull(do.astype(o.dtype))

        norms = [float(jnp.linalg.norm(x.astype(jnp.float32))) for x in both(do, q, k, v, g, beta)]
        times = {
            "forward_ms": median_ms(lambda: forward(q, k, v, g, beta), jax.block_until_ready),
            "both_ms": median_ms(lambda: both(do, q, k, v, g, beta), jax.block_until_ready),
        }
    return {"devices": devices} | times | {"norms": norms}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--devices", default="1,2,4")
    args = parser.parse_args()
    for devices in map(int, args.devices.split(",")):
        print(json.dumps(measure(args.tokens, args.heads, args.dim, devices)), flush=True)


if __name__ == "__main__":
    main()
