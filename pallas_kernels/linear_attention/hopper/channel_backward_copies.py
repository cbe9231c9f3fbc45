"""Shared memory of the kernel in channel_backward_chunks.py, and a warpgroup that copies into it.

Buffers become free at different times of a chunk, and each is filled with the next chunk's as soon as it is:
q, k; what depends on values (V', dO, dV); what depends on states (S, dS), in as many turns as the
warpgroups at work take. The few numbers of a chunk have two slots.
"""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks
from pallas_kernels.linear_attention.hopper.blocks import F32, C

BF16, F16 = jnp.bfloat16, jnp.float16
WIDTH = 32  # channels at work in a warpgroup
WORKERS = 2  # warpgroups at work


def buffers(parts: int, turns: int, blocks_v: int, *, delta: bool, documents: bool) -> dict[str, Any]:
    """Buffers and barriers by name.

    parts: of `WIDTH` channels of a key.  turns: parts a warpgroup takes, one after the other.  blocks_v: of C
    channels of a value.
    """
    return dict(
        q=blocks.smem((parts, C, WIDTH), BF16),
        k=blocks.smem((parts, C, WIDTH), BF16),
        u=blocks.smem((blocks_v, C, C), BF16, WIDTH),
        d=blocks.smem((1 + delta, blocks_v, C, C), BF16, WIDTH),  # dO, dV
        h=blocks.smem((parts, blocks_v, C, WIDTH), BF16),
        g=blocks.smem((parts, blocks_v, C, WIDTH), BF16),
        # E and F, additive the two parts of E; of all pairs and of those left at a level
        pairs=blocks.smem((2, 2, C, C), BF16, WIDTH),
        middle=blocks.smem((2, C, C), F16, WIDTH),  # the same for: offsets from the middle = middle @ steps
        steps=blocks.smem((WORKERS, C, WIDTH), F16),
        tiles=blocks.smem((WORKERS, 2, C, WIDTH), BF16),
        norms=plgpu.SMEM((2, 3, C), F32),
        carry=plgpu.SMEM((2, parts * WIDTH), F32),
        segment=plgpu.SMEM((2, 2, C), F32) if documents else None,
        rows=plgpu.SMEM((2 + 2 * WORKERS, C), F32),  # diagonals of dO U^T, dV U^T; q.dq, k.dk by warpgroup
        numbers_filled=plgpu.Barrier(num_arrivals=2 + 2 * documents, num_barriers=2),
        qk_filled=plgpu.Barrier(num_arrivals=2 * parts),
        qk_free=plgpu.Barrier(num_arrivals=WORKERS),
        v_filled=plgpu.Barrier(num_arrivals=(2 + delta) * blocks_v),
        v_free=plgpu.Barrier(num_arrivals=WORKERS),
        h_filled=plgpu.Barrier(num_arrivals=2 * WORKERS * blocks_v, num_barriers=turns),
        h_free=plgpu.Barrier(num_arrivals=WORKERS, num_barriers=turns),
        both=plgpu.Barrier(num_arrivals=WORKERS),
        done=plgpu.Barrier(num_arrivals=WORKERS + 1),
    )


def issue_copies(refs: dict[str, Any], s: dict[str, Any], at: SimpleNamespace) -> None:
    """refs, s: the kernel's arrays and its buffers and barriers, by name.

    at: b, head, key_head, first (chunk), steps (chunks), parts (of `WIDTH` channels), turns, blocks_v (of C,
    from first_value).
    """
    copy = plgpu.copy_gmem_to_smem

    def fill_numbers(i: Any) -> None:
        slot, n = blocks.rem(i, 2), at.first + i
        barrier = s["numbers_filled"].at[slot]
        copy(refs["norms"].at[at.b, at.head, n], s["norms"].at[slot], barrier)
        copy(refs["carry"].at[at.b, at.head, n], s["carry"].at[slot], barrier)
        if "segment" in refs:
            for which, name in enumerate(("segment", "entering")):
                copy(refs[name].at[at.b, pl.ds(n * C, C)], s["segment"].at[slot, which], barrier)

    def fill_keys(i: Any) -> None:
        rows = pl.ds((at.first + i) * C, C)
        for part in range(at.parts):
            source = (at.b, rows, at.key_head, pl.ds(part * WIDTH, WIDTH))
            copy(refs["q"].at[source], s["q"].at[part], s["qk_filled"])
            copy(refs["k"].at[source], s["k"].at[part], s["qk_filled"])

    def fill_values(i: Any) -> None:
        rows = pl.ds((at.first + i) * C, C)
        for block in range(at.blocks_v):
            source = (at.b, rows, at.head, pl.ds(at.first_value + block * C, C))
            copy(refs["u"].at[source], s["u"].at[block], s["v_filled"])
            copy(refs["do"].at[source], s["d"].at[0, block], s["v_filled"])
            if "dv" in refs:
                copy(refs["dv"].at[source], s["d"].at[1, block], s["v_filled"])

    def fill_states(i: Any, turn: int) -> None:
        barrier = s["h_filled"].at[turn]
        for part in range(turn, at.parts, at.turns):
            columns = pl.ds(part * WIDTH, WIDTH)
            for block in range(at.blocks_v):
                values = pl.ds(at.first_value + block * C, C)
                source = (at.b, at.head, at.first + i, values, columns)
                copy(refs["h"].at[source], s["h"].at[part, block], barrier)
                copy(refs["g"].at[source], s["g"].at[part, block], barrier)

    start = jnp.int32(0)
    fill_numbers(start)
    fill_values(start)
    for turn in range(at.turns):
        fill_states(start, turn)
    fill_keys(start)

    @pl.loop(1, at.steps)
    def _(i: Any) -> None:
        fill_numbers(i)
        for turn in range(at.turns):  # in the order in which buffers become free
            if turn == at.turns - 1:
                plgpu.barrier_wait(s["v_free"])
                fill_values(i)
            plgpu.barrier_wait(s["h_free"].at[turn])
            fill_states(i, turn)
        plgpu.barrier_wait(s["qk_free"])
        fill_keys(i)

    for turn in range(at.turns):
        plgpu.barrier_wait(s["h_free"].at[turn])
    plgpu.barrier_wait(s["v_free"])
    plgpu.barrier_wait(s["qk_free"])
