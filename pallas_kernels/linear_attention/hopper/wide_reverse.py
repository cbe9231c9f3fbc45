"""The reverse scan of the delta rule for heads of up to 256 x any V: dS after each chunk, and dV on the way.

With dS the gradient of the state that leaves a chunk, and e, f, P, A as in forward.py,
    dV' = P^T dO + f K dS
    dV  = beta A^T dV'
    dS <- exp(G_C) dS + scale (e Q)^T dO - (e K)^T dV
Laid out as wide_scan.py: a block of threads per sequence, value head and slice of 64 values.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, two_parts
from pallas_kernels.linear_attention.hopper.blocks import BETA, CARRY, F32, READ_K, READ_Q, WRITE, C
from pallas_kernels.linear_attention.hopper.head_tiles import HeadTiles
from pallas_kernels.linear_attention.hopper.inputs import Inputs
from pallas_kernels.linear_attention.hopper.wide_scan import GATES, STAGES, buffers, launch, traced, two_roles

BF16 = jnp.bfloat16


def wide_reverse(
    inputs: Inputs, tiles: HeadTiles, do: jax.Array, d_state: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dS^T after each chunk [B, HV, T/C, V, K], dV [B, T, HV, V], bf16; dS^T before the first, float32.

    do: [B, T, HV, V] bf16.  d_state: dS^T after the last chunk [B, HV, V, K] float32, or None.
    """
    batch, length, heads, key_dim = inputs.k.shape
    value_heads, value_dim = inputs.v.shape[2:]
    group, chunks = value_heads // heads, length // C
    stages = min(STAGES, chunks)
    arrays: dict[str, Any] = dict(q=inputs.q, k=inputs.k, do=do, last=d_state, **tiles.named)
    results = dict(
        states=jax.ShapeDtypeStruct((batch, value_heads, chunks, value_dim, key_dim), BF16),
        dv=jax.ShapeDtypeStruct((batch, length, value_heads, value_dim), BF16),
        first=jax.ShapeDtypeStruct((batch, value_heads, value_dim, key_dim), F32),
    )
    scratch = dict(
        q=blocks.smem((stages, C, key_dim), BF16),
        k=blocks.smem((stages, C, key_dim), BF16),
        do=blocks.smem((stages, C, C), BF16),
        dv=blocks.smem((1, C, C), BF16),  # before, if a chunk is hard: A's second part
        rest=blocks.smem((1, C, C), BF16),  # then: second parts of what multiplies A and k
        **buffers(stages, key_dim),
    )

    def body(refs: dict[str, Any], s: dict[str, Any]) -> None:
        b, head, value_block, wg = (lax.axis_index(name) for name in ("b", "h", "v", "wg"))
        key_head = blocks.div(head, group)
        columns = pl.ds(value_block * C, C)

        number = lambda slot, row: blocks.col_vector(s["gates"].at[slot, GATES.index(row)])

        def fill(i: Any, slot: Any) -> None:
            n = chunks - 1 - traced(i)
            rows, barrier = pl.ds(n * C, C), s["filled"].at[slot]
            copy = lambda source, name: plgpu.copy_gmem_to_smem(source, s[name].at[slot], barrier)
            copy(refs["k"].at[b, rows, key_head], "k")
            copy(refs["q"].at[b, rows, key_head], "q")
            copy(refs["do"].at[b, rows, head, columns], "do")
            copy(refs["scores"].at[b, head, rows], "scores")
            copy(refs["high"].at[b, head, rows], "high")
            for place, row in enumerate(GATES):
                source = refs["gates"].at[b, head, n, row]
                plgpu.copy_gmem_to_smem(source, s["gates"].at[slot, place], barrier)

        def begin(i: Any, g: jax.Array, hard: jax.Array) -> tuple[jax.Array, jax.Array]:
            """dS^T; (K dS)^T, of one part."""
            n, slot, zero = chunks - 1 - i, blocks.rem(i, stages), two_parts.hidden_zero(hard)
            low = lambda: refs["low"].at[b, head, pl.ds(n * C, C)]
            two_parts.load_low(hard > 0.0, low, s["dv"].at[zero], s["low"])
            target = refs["states"].at[b, head, n, columns]
            blocks.send(s["state"].at[0], g, target)
            plgpu.barrier_wait(s["filled"].at[slot])
            return g, blocks.matmul((s["state"].at[zero], s["k"].at[slot].T))

        def step(i: Any, g: jax.Array, dv: jax.Array, parts: int, hard: jax.Array) -> jax.Array:
            n, slot = chunks - 1 - i, blocks.rem(i, stages)
            dv_s, room_s, g_s = (s[x].at[two_parts.hidden_zero(hard)] for x in ("dv", "rest", "state"))
            do_t = s["do"].at[slot].T
            carry = refs["gates"][b, head, n, CARRY, 0]
            dv = two_parts.add_rest(dv, g, s["k"].at[slot], parts, g_s)
            dv = dv * blocks.by_col(number(slot, WRITE))
            read_t = (blocks.tile(do_t) * blocks.by_col(number(slot, READ_Q))).astype(BF16)
            dv, g = blocks.matmul(
                (do_t, s["scores"].at[slot], dv),
                (read_t, s["q"].at[slot], g * carry),
            )
            dx = two_parts.times_inverse(dv, s["high"].at[slot], dv_s, s["low"], parts, room=room_s)
            back = number(slot, BETA) * number(slot, READ_K) * -1.0
            seen = two_parts.split(dx * blocks.by_col(back), parts, room=room_s)
            (g,) = blocks.sums_of_products(([(part, s["k"].at[slot]) for part in seen], g))
            dv = dx * blocks.by_col(number(slot, BETA))
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the last chunk's dV has left
            blocks.store(dv_s, dv.astype(BF16), transposed=True)
            plgpu.commit_smem()  # also before the arrival: TMA may then overwrite what was read here
            plgpu.barrier_arrive(s["free"].at[slot])
            plgpu.copy_smem_to_gmem(dv_s, refs["dv"].at[b, pl.ds(n * C, C), head, columns])
            return g

        def hold_state() -> None:
            g = blocks.state(refs.get("last"), (C, key_dim), (b, head, columns))
            g = two_parts.loop(chunks, step, g, lambda i: refs["hard"][b, head, chunks - 1 - i, 0], begin)
            refs["first"].at[b, head, columns][...] = g
            plgpu.wait_smem_to_gmem(0)

        two_roles(wg, hold_state, lambda: blocks.refill(fill, s["free"], chunks, stages), s["done"])

    out = launch("delta_wide_reverse", inputs, body, arrays, results, scratch)
    return out["states"], out["dv"], out["first"]
