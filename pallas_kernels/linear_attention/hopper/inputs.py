"""What the kernels read, laid out for them once in XLA, and the copies of a chunk's numbers per token."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.call import QKV, Call
from pallas_kernels.linear_attention.hopper import blocks
from pallas_kernels.linear_attention.hopper.blocks import F32, C
from pallas_kernels.padding import pad_time, round_up

LEAST_DECAY = -104.0  # exp is 0 in float32; what is below would drown the other steps in a chunk's sums
LEAST_BETA = 2.0**-18  # the backward pass divides by beta; a beta this small moves o by less than 4e-6


class Over(NamedTuple):
    """Rows that are cut over the devices of a mesh axis; see `Call`."""

    axis: str
    continues: jax.Array


@dataclasses.dataclass(frozen=True)
class Inputs(QKV):
    """The arguments of a call, padded to whole chunks; numbers per token are head-major float32.

    q, k: [B, T, H, K] bf16.  v: [B, T, HV, V] bf16.  beta: None or [B, HV, T].
    log_decay: None, [B, HV, T] not below `LEAST_DECAY`, or per key channel [B, T, HV, K], which may be bf16.
    segment: None or [B, T], the document of each token (a whole number below 2^24).
    entering: None or [B, T], the document that enters the token's chunk: that of the token before the chunk.
    state: None or S_0^T [B, HV, V, K] float32.
    over: None or where the pieces before and after are (pieces.py).  strong: as in `Call`.
    """

    log_decay: jax.Array | None
    beta: jax.Array | None
    segment: jax.Array | None
    state: jax.Array | None
    scale: float
    l2norm: bool
    interpret: Any
    entering: jax.Array | None = None
    over: Over | None = None
    strong: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, T, H, HV, K, V."""
        batch, length, heads, key_dim = self.k.shape
        return batch, length, heads, self.v.shape[2], key_dim, self.v.shape[3]


class Chunks(NamedTuple):
    """What the delta rule's gradients of a chunk are made of beside q and k.

    gates: [B, HV, T/C, 8, C] float32, all rows (see blocks).  states, state_gradients: S^T before and dS^T
    after each chunk, [B, HV, T/C, V, K] bf16.  values, do, dv: V', dO, dV [B, T, HV, V] bf16.
    """

    gates: jax.Array
    states: jax.Array
    state_gradients: jax.Array
    values: jax.Array
    do: jax.Array
    dv: jax.Array


def prepare(call: Call) -> Inputs:
    """Pads T to whole chunks (tokens with k = v = 0 and no decay change nothing) and lays vectors out."""
    length = round_up(call.q.shape[1], C)
    segment = entering = None
    if call.segment_ids is not None:
        segment = pad_time(call.segment_ids, length, "edge").astype(F32)
        last = segment[:, C - 1 :: C]
        entering = jnp.repeat(jnp.concatenate([segment[:, :1], last[:, :-1]], 1), C, axis=1)
    beta = None if call.beta is None else blocks.head_major(call.beta, length)
    if beta is not None:
        beta = jnp.where(jnp.abs(beta) < LEAST_BETA, LEAST_BETA, beta)
    log_decay = call.log_decay
    if log_decay is not None and call.per_channel:
        steps = log_decay if log_decay.dtype == jnp.bfloat16 else log_decay.astype(F32)
        log_decay = pad_time(steps, length)
    elif log_decay is not None:
        log_decay = jnp.maximum(blocks.head_major(log_decay, length), LEAST_DECAY)
    return Inputs(
        q=pad_time(call.q, length),
        k=pad_time(call.k, length),
        v=pad_time(call.v, length),
        log_decay=log_decay,
        beta=beta,
        segment=segment,
        entering=entering,
        state=None if call.initial_state is None else jnp.swapaxes(call.initial_state, 2, 3),
        scale=call.scale,
        l2norm=call.qk_l2norm,
        interpret=call.interpret,
        strong=call.strong,
        over=None if call.axis is None or call.continues is None else Over(call.axis, call.continues),
    )


def fetch(refs: Any, smem: Any, slot: Any, barrier: Any, **places: tuple) -> None:
    """Starts copies to ``slot`` of buffers from places in arrays of the same names, of those there are."""
    for name, place in places.items():
        if name in refs:
            plgpu.copy_gmem_to_smem(refs[name].at[place], smem[name].at[slot], barrier)


def fetch_values(
    ref: Any, place: tuple, first: Any, buffer: Any, slot: Any, barrier: Any, tiles: int
) -> None:
    """As many tiles of C values, from the ``first`` one on, of tokens at ``place``."""
    for tile in range(tiles):
        columns = pl.ds(first + tile * C, C)
        plgpu.copy_gmem_to_smem(ref.at[(*place, columns)], buffer.at[slot, tile], barrier)


class Vectors:
    """The numbers per token that a kernel reads: rows of a shared-memory buffer [rows, C].

    named: those of ``names`` that there are, by the names that they have among a kernel's arrays.
    """

    def __init__(self, inputs: Inputs, names: Sequence[str]):
        arrays = {"in_" + name: getattr(inputs, name) for name in names}
        self.named = {name: array for name, array in arrays.items() if array is not None}

    def __len__(self) -> int:
        return len(self.named)

    def copy(self, refs: Any, buffer: Any, barrier: Any, b: Any, head: Any, rows: Any) -> None:
        """refs: of all of a kernel's arrays, by name."""
        for row, (name, array) in enumerate(self.named.items()):
            source = refs[name].at[b, rows] if array.ndim == 2 else refs[name].at[b, head, rows]
            plgpu.copy_gmem_to_smem(source, buffer.at[row], barrier)

    def get(self, name: str, buffer: Any) -> Any:
        return buffer.at[list(self.named).index("in_" + name)]

    def has(self, name: str) -> bool:
        return "in_" + name in self.named
