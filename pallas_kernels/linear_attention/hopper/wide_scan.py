"""The scan of the delta rule, and its reverse (formulas: backward_scan.py), for heads of up to 256 x any V.

One decay per head or none. A block of threads per sequence, value head and slice of 64 values: one warpgroup
holds S^T, or its gradient (64 values by K, float32, in registers; 128 of a thread's 255 at K = 256), and runs
the chain of products, one issues the copies. What does not depend on V is in `HeadTiles`. The state meets the
products from shared memory: a second copy of it in registers would not fit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, two_parts
from pallas_kernels.linear_attention.hopper.blocks import BETA, BF16, CARRY, F32, READ_K, READ_Q, WRITE, C
from pallas_kernels.linear_attention.hopper.forward_scan import Scanned
from pallas_kernels.linear_attention.hopper.head_tiles import HeadTiles
from pallas_kernels.linear_attention.hopper.inputs import Inputs, fetch

STAGES = 2
GATES = (READ_K, READ_Q, WRITE, BETA)  # the rows of `HeadTiles.gates` that a scan reads whole


def buffers(stages: int, key_dim: int) -> dict[str, Any]:
    """What the scan and its reverse have in shared memory besides q, k and what runs over V."""
    return dict(
        high=blocks.smem((stages, C, C), BF16),
        scores=blocks.smem((stages, C, C), BF16),
        gates=plgpu.SMEM((stages, len(GATES), C), F32),
        state=blocks.smem((1, C, key_dim), BF16),
        filled=plgpu.Barrier(num_arrivals=5 + len(GATES), num_barriers=stages),
        free=plgpu.Barrier(num_barriers=stages),
        low=plgpu.Barrier(),
    )


def launch(
    name: str, inputs: Inputs, body: Callable, arrays: dict[str, Any], results: Any, scratch: dict[str, Any]
) -> dict[str, Any]:
    """A block of two warpgroups for each sequence, value head and slice of values."""
    batch, _, heads, value_dim = inputs.v.shape
    grid = dict(b=batch, h=heads, v=value_dim // C)
    return blocks.launch(inputs, name, body, arrays, results, scratch, grid, threads=2)


def traced(n: Any) -> Any:
    """A chunk's number as an operand, also where it is known: one way to address chunks in all turns."""
    return jnp.int32(n) if isinstance(n, int) else n


def wide_scan(inputs: Inputs, tiles: HeadTiles, *, final: bool, keep: bool) -> Scanned:
    """`final` for the last state, `keep` for the states and V' that the backward pass wants."""
    batch, length, heads, value_heads, key_dim, value_dim = inputs.sizes
    group, chunks = value_heads // heads, length // C
    stages = min(STAGES, chunks)
    outputs = jax.ShapeDtypeStruct((batch, length, value_heads, value_dim), BF16)
    results: dict[str, Any] = dict(o=outputs)
    if final:
        results |= dict(final=jax.ShapeDtypeStruct((batch, value_heads, value_dim, key_dim), F32))
    if keep:
        states = jax.ShapeDtypeStruct((batch, value_heads, chunks, value_dim, key_dim), BF16)
        results |= dict(states=states, values=outputs)
    arrays: dict[str, Any] = dict(q=inputs.q, k=inputs.k, v=inputs.v, initial=inputs.state, **tiles.named)
    scratch = dict(
        keys=blocks.smem((stages, 2 * C, key_dim), BF16),  # k, then q: one product reads the state for both
        v=blocks.smem((stages, C, C), BF16),
        o=blocks.smem((1, C, C), BF16),  # before, if the chunk is hard: A's second part
        values=blocks.smem((1, C, C), BF16),  # and second parts of what it multiplies, and of V'
        **buffers(stages, key_dim),
    )

    def body(refs: dict[str, Any], s: dict[str, Any]) -> None:
        b, head, value_block, wg = (lax.axis_index(name) for name in ("b", "h", "v", "wg"))
        key_head = blocks.div(head, group)
        columns = pl.ds(value_block * C, C)

        def by_token(slot: Any, row: int) -> jax.Array:
            return blocks.by_col(blocks.col_vector(s["gates"].at[slot, GATES.index(row)]))

        def fill(n: Any, slot: Any) -> None:
            n = traced(n)
            rows, barrier = pl.ds(n * C, C), s["filled"].at[slot]
            copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, barrier)
            copy(refs["k"].at[b, rows, key_head], s["keys"].at[slot, pl.ds(0, C)])
            copy(refs["q"].at[b, rows, key_head], s["keys"].at[slot, pl.ds(C, C)])
            copy(refs["v"].at[b, rows, head, columns], s["v"].at[slot])
            copy(refs["high"].at[b, head, rows], s["high"].at[slot])
            copy(refs["scores"].at[b, head, rows], s["scores"].at[slot])
            for place, row in enumerate(GATES):
                copy(refs["gates"].at[b, head, n, row], s["gates"].at[slot, place])

        def begin(n: Any, state: jax.Array, hard: jax.Array) -> tuple[jax.Array, ...]:
            """The state; X^T, X = beta (V - e K S); (scale e Q S)^T; exp(G_C)."""
            zero, slot = two_parts.hidden_zero(hard), blocks.rem(n, stages)
            # Not by way of shared memory, which is full to the last 1000 bytes with K = 256.
            carry = refs["gates"][b, head, n, CARRY, 0]
            low = lambda: refs["low"].at[b, head, pl.ds(n * C, C)]
            two_parts.load_low(hard > 0.0, low, s["o"].at[zero], s["low"])
            if keep:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the last chunk's state has left
            blocks.store(s["state"].at[0], state.astype(BF16))
            plgpu.commit_smem()
            if keep:
                plgpu.copy_smem_to_gmem(s["state"].at[0], refs["states"].at[b, head, n, columns])
            plgpu.barrier_wait(s["filled"].at[slot])
            read = blocks.matmul((s["state"].at[zero], s["keys"].at[slot].T))
            value = blocks.tile(s["v"].at[slot].T) - read[:, :C] * by_token(slot, READ_K)
            return state, value * by_token(slot, BETA), read[:, C:] * by_token(slot, READ_Q), carry

        def step(n: Any, state: Any, value: Any, read: Any, carry: Any, parts: int, hard: Any) -> jax.Array:
            slot, rows = blocks.rem(n, stages), pl.ds(n * C, C)
            o_s, values_s = (s[x].at[two_parts.hidden_zero(hard)] for x in ("o", "values"))
            pair = s["high"].at[slot].T, o_s.T, s["low"]
            value = two_parts.times_inverse(value, *pair, parts, hard, room=values_s)
            values = two_parts.split(value, parts, hard, room=values_s)
            seen = lambda: ([(part, s["scores"].at[slot].T) for part in values], read)

            def written() -> tuple:
                new = two_parts.split(value * by_token(slot, WRITE), parts, room=values_s)
                return [(part, s["keys"].at[slot, pl.ds(0, C)]) for part in new], state * carry

            def leave(o: jax.Array) -> None:
                plgpu.wait_smem_to_gmem(int(keep), wait_read_only=True)  # the last chunk's results have left
                blocks.store(o_s, o.astype(BF16), transposed=True)

            if parts == 1:
                o, state = blocks.sums_of_products(seen(), written())
                leave(o)
            else:
                leave(*blocks.sums_of_products(seen()))
                (state,) = blocks.sums_of_products(written())
            if keep:
                blocks.store(values_s, values[0], transposed=True)
            plgpu.commit_smem()  # also before the arrival: TMA may then overwrite what was read here
            plgpu.barrier_arrive(s["free"].at[slot])
            if keep:
                values = refs["values"].at[b, rows, head, columns]
                plgpu.copy_smem_to_gmem(values_s, values, commit_group=False)
            plgpu.copy_smem_to_gmem(o_s, refs["o"].at[b, rows, head, columns])
            return state

        def hold_state() -> None:
            state = blocks.state(refs.get("initial"), (C, key_dim), (b, head, columns))
            state = two_parts.loop(chunks, step, state, lambda n: refs["hard"][b, head, n, 0], begin)
            if final:
                refs["final"].at[b, head, columns][...] = state
            plgpu.wait_smem_to_gmem(0)

        pl.when(wg == 0)(hold_state)
        pl.when(wg == 1)(lambda: blocks.refill(fill, s["free"], chunks, stages))

    return Scanned(**launch("delta_wide_scan", inputs, body, arrays, results, scratch))


def wide_reverse(
    inputs: Inputs, tiles: HeadTiles, do: jax.Array, d_state: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dS^T after each chunk [B, HV, T/C, V, K], dV [B, T, HV, V], bf16; dS^T before the first, float32.

    do: [B, T, HV, V] bf16.  d_state: dS^T after the last chunk [B, HV, V, K] float32, or None.
    """
    batch, length, heads, value_heads, key_dim, value_dim = inputs.sizes
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
            keys, pairs = (b, rows, key_head), (b, head, rows)
            places = dict(k=keys, q=keys, do=(b, rows, head, columns), scores=pairs, high=pairs)
            fetch(refs, s, slot, barrier, **places)
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

        pl.when(wg == 0)(hold_state)
        pl.when(wg == 1)(lambda: blocks.refill(fill, s["free"], chunks, stages))

    out = launch("delta_wide_reverse", inputs, body, arrays, results, scratch)
    return out["states"], out["dv"], out["first"]
