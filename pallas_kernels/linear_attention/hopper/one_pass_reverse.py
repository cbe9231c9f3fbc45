"""The reverse scan with a decay per key channel, delta rule or additive, in one pass over chunks of 16.

With dS the gradient of the state that leaves a chunk, and what one_pass.py says of G, A, P and C,
    dV' = P^T dO + (k exp(G_C - G)) dS      dV = beta A^T dV'
    dS <- exp(G_C) dS + (q exp G)^T dO - (k exp G)^T dV
Nothing but q, k, log-decays and beta is read beside dO: tiles are prepared as in the forward
(one_pass_walk.py), and dS^T is held as S^T is there. Right where the forward is.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, one_pass_tiles
from pallas_kernels.linear_attention.hopper.blocks import F32, C, sums_of_products
from pallas_kernels.linear_attention.hopper.inverse import ROWS
from pallas_kernels.linear_attention.hopper.one_pass_chunk import ADDITIVE_REVERSE, CHANNELS, REVERSE
from pallas_kernels.linear_attention.hopper.one_pass_walk import AHEAD, BF16, HOLDING, PREPARING, Walk


@dataclasses.dataclass(frozen=True)
class ReversePass(Walk):
    """do: [B, T, HV, V] bf16.  d_state: gradient of the last state [B, HV, V, K] float32 or None (zero).

    A call: dS^T after every 64 tokens [B, HV, T/C, V, K], dV [B, T, HV, V], bf16; dS^T of the first state
    [B, HV, V, K] float32.
    """

    do: jax.Array
    d_state: jax.Array | None

    stages = PREPARING
    widths = property(lambda self: (REVERSE if self.delta else ADDITIVE_REVERSE)._replace(half=self.half))

    def __call__(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        batch, length, _, heads, *_ = self.inputs.sizes
        struct = jax.ShapeDtypeStruct
        results = dict(
            ds=struct((batch, heads, length // C, CHANNELS, CHANNELS), BF16),
            dv=struct(self.do.shape, BF16),
            first=struct((batch, heads, CHANNELS, CHANNELS), F32),
        )
        scratch = dict(
            v=blocks.smem((HOLDING, AHEAD, C, C), BF16),  # dO
            dv=blocks.smem((HOLDING, C, C), BF16),
            ds=blocks.smem((HOLDING, C, CHANNELS), BF16),
        )
        arrays = dict(v=self.do, last=self.d_state)
        out = self.launch("one_pass_reverse", arrays, results, scratch, self.hold_gradient)
        return out["ds"], out["dv"], out["first"]

    def tile(self, at: SimpleNamespace, n: Any) -> Any:
        return at.tiles - 1 - n

    def hold_gradient(self, at: SimpleNamespace, wg: Any) -> None:
        smem, refs = at.smem, at.refs
        columns = pl.ds(wg * C, C)
        ds = blocks.state(getattr(refs, "last", None), (C, CHANNELS), (at.b, at.head, columns))
        for n in range(min(AHEAD, at.tiles)):
            self.fetch(at, wg, n, n)

        def step(n: Any, ds: jax.Array) -> jax.Array:
            target = refs.ds.at[at.b, at.head, self.tile(at, n), columns]
            blocks.send(smem.ds.at[wg], ds, target)
            self.wait_for_tile(at, wg, n)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            for chunk in reversed(range(C // ROWS)):
                ds = self.advance(at, wg, n, chunk, ds)
            self.release(at, wg, n)
            plgpu.copy_smem_to_gmem(smem.dv.at[wg], refs.dv.at[at.b, self.rows(at, n), at.head, columns])
            return ds

        refs.first.at[at.b, at.head, columns][...] = lax.fori_loop(0, at.count, step, ds)
        plgpu.wait_smem_to_gmem(0)

    def advance(self, at: SimpleNamespace, wg: Any, n: Any, chunk: int, ds: jax.Array) -> jax.Array:
        """The gradient of the state before a chunk; that of its values goes to shared memory."""
        i, smem = self.inputs, at.smem
        slot, tokens = blocks.rem(n, self.stages), pl.ds(chunk * ROWS, ROWS)
        written = smem.g.at[slot].at[tokens].T
        do = blocks.tile(smem.v.at[wg, blocks.rem(n, AHEAD)].at[tokens].T, BF16)
        if self.delta:
            beta = blocks.by_col(blocks.col_vector(smem.beta.at[slot].at[tokens]), (C, ROWS))
        read = blocks.matmul((ds.astype(BF16), written))
        made = smem.pairs.at[slot, chunk]
        if self.delta:
            both = one_pass_tiles.gradients_of(read, do, beta, made, interpret=i.interpret)
            dv, read_by = both[:, :ROWS], pl.ds(2 * chunk * ROWS, 2 * ROWS)
        else:
            both, read_by = do, pl.ds((2 * chunk + 1) * ROWS, ROWS)
            dv = one_pass_tiles.additive_gradients_of(read, do, made, interpret=i.interpret)

        def finish() -> None:
            blocks.store(smem.dv.at[wg].at[tokens], dv, transposed=True)

        carry = blocks.by_col(blocks.col_vector(smem.carry.at[slot, chunk]), (C, CHANNELS))
        keys = smem.qk.at[slot].at[read_by]
        (ds,) = sums_of_products(([(both, keys)], ds * carry), meanwhile=finish)
        return ds
