"""Shared memory of the kernel in channel_backward_chunks.py, and a warpgroup that copies into it.

Buffers become free at different times of a chunk, and each is filled with the next chunk's as soon as it is:
what depends on values (V', dO, dV) and on states (S, dS) early, q and k when their gradients, which leave
from there, have gone. The few numbers of a chunk and its log-decays have two slots.
"""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks
from pallas_kernels.linear_attention.hopper.blocks import BF16, F32, C

F16 = jnp.float16
ONES = 8  # columns of the least product
HALF = C // 2  # tokens of a half: gradients are kept as two halves, for fewer registers in flight


def buffers(*, workers: int, blocks_v: int, delta: bool, documents: bool, direct: bool) -> dict[str, Any]:
    """Buffers and barriers by name.

    workers: of C channels of a key each.  blocks_v: of C channels of a value.  direct: log-decays are not
    bf16, and workers load them and leave them here in base 2 and float16.
    """
    keys = (workers, C, C)
    return dict(
        q=blocks.smem(keys, BF16),
        k=blocks.smem(keys, BF16),
        decay=blocks.smem((1, *keys) if direct else (2, *keys), F16 if direct else BF16),
        d_decay=blocks.smem(keys, BF16) if direct else None,
        u=blocks.smem((blocks_v, C, C), BF16),
        d=blocks.smem((1 + delta, blocks_v, C, C), BF16),  # dO, dV
        h=blocks.smem((workers, blocks_v, C, C), BF16),
        g=blocks.smem((workers, blocks_v, C, C), BF16),
        pairs=blocks.smem((2, C, C), BF16, HALF),  # E and F, additive the two parts of E
        # offsets from the middle = middle @ steps: of the whole chunk, of a finer level
        middle=blocks.smem((2, C, C), F16),
        later=blocks.smem((C, C), BF16, HALF),
        ones=blocks.smem((ONES, C), BF16),
        norms=plgpu.SMEM((2, 3, C), F32),
        carry=plgpu.SMEM((2, workers * C), F32),
        segment=plgpu.SMEM((2, 2, C), F32) if documents else None,
        rows=plgpu.SMEM((2 + 2 * workers, C), F32),  # diagonals of E', dV U^T; q.dq, k.dk by warpgroup
        numbers_filled=plgpu.Barrier(num_arrivals=2 + 2 * documents, num_barriers=2),
        qk_filled=plgpu.Barrier(num_arrivals=2 * workers),
        decay_filled=None if direct else plgpu.Barrier(num_arrivals=workers, num_barriers=2),
        left=plgpu.Barrier(num_arrivals=workers),  # results have left the buffers of q, k, log-decays
        v_filled=plgpu.Barrier(num_arrivals=(2 + delta) * blocks_v),
        v_free=plgpu.Barrier(num_arrivals=workers),
        h_filled=plgpu.Barrier(num_arrivals=2 * workers * blocks_v),
        h_free=plgpu.Barrier(num_arrivals=workers),
        both=plgpu.Barrier(num_arrivals=workers),
    )


def issue_copies(refs: dict[str, Any], s: dict[str, Any], at: SimpleNamespace) -> None:
    """Fills each buffer as soon as it is free; refs, s: arrays and buffers by name."""
    copy = plgpu.copy_gmem_to_smem
    rows = lambda i: pl.ds((at.first + i) * C, C)
    columns = lambda w: pl.ds(w * C, C)

    def fill_numbers(i: Any) -> None:
        slot, n = blocks.rem(i, 2), at.first + i
        barrier = s["numbers_filled"].at[slot]
        copy(refs["norms"].at[at.b, at.head, n], s["norms"].at[slot], barrier)
        copy(refs["carry"].at[at.b, at.head, n], s["carry"].at[slot], barrier)
        if at.documents:
            for which, name in enumerate(("segment", "entering")):
                copy(refs[name].at[at.b, rows(i)], s["segment"].at[slot, which], barrier)

    def fill_keys(i: Any) -> None:
        for w in range(at.workers):
            for name in "qk":
                source = refs[name].at[at.b, rows(i), at.key_head, columns(w)]
                copy(source, s[name].at[w], s["qk_filled"])

    def fill_decay(i: Any) -> None:
        slot = blocks.rem(i, 2)
        for w in range(0 if at.direct else at.workers):
            source = refs["decay"].at[at.b, rows(i), at.head, columns(w)]
            copy(source, s["decay"].at[slot, w], s["decay_filled"].at[slot])

    def fill_values(i: Any) -> None:
        for block in range(at.blocks_v):
            source = (at.b, rows(i), at.head, pl.ds(at.first_value + block * C, C))
            copy(refs["u"].at[source], s["u"].at[block], s["v_filled"])
            copy(refs["do"].at[source], s["d"].at[0, block], s["v_filled"])
            if at.delta:
                copy(refs["dv"].at[source], s["d"].at[1, block], s["v_filled"])

    def fill_states(i: Any) -> None:
        for w in range(at.workers):
            for block in range(at.blocks_v):
                values = pl.ds(at.first_value + block * C, C)
                source = (at.b, at.head, at.first + i, values, columns(w))
                copy(refs["h"].at[source], s["h"].at[w, block], s["h_filled"])
                copy(refs["g"].at[source], s["g"].at[w, block], s["h_filled"])

    start = jnp.int32(0)
    for fill in (fill_numbers, fill_values, fill_decay, fill_states, fill_keys):
        fill(start)
    pl.when(at.steps > 1)(lambda: fill_decay(start + 1))

    @pl.loop(1, at.steps)
    def _(i: Any) -> None:
        fill_numbers(i)
        plgpu.barrier_wait(s["v_free"])
        fill_values(i)
        plgpu.barrier_wait(s["h_free"])
        fill_states(i)
        plgpu.barrier_wait(s["left"])
        fill_keys(i)
        pl.when(i + 1 < at.steps)(lambda: fill_decay(i + 1))

    for name in ("v_free", "h_free", "left"):
        plgpu.barrier_wait(s[name])
