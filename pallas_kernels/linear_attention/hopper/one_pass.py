"""The forward with a decay per key channel, delta rule or additive, in one pass over chunks of 16 tokens.

A block of threads walks a sequence of one value head: two warpgroups copy and prepare
(one_pass_walk.py) every other tile of 64 tokens, a tile or two ahead, and two hold S^T (64 values by K
each). With G the sums of log-decays from a chunk's start, C its last token,
    V' = A beta (V - (k exp G) S)      o = (q exp G) S + P V'
    S <- exp(G_C) S + (k exp(G_C - G))^T V'
A = (I + L)^-1, L and P the products of k exp G and q exp G with k exp -G: one anchor a chunk, and more where
G is out of range. From the first token on that is hard (two_parts.py), results are wrong; `first_wrong` says
which it is.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, one_pass_tiles, two_parts
from pallas_kernels.linear_attention.hopper.blocks import F32, C, sums_of_products
from pallas_kernels.linear_attention.hopper.inverse import ROWS
from pallas_kernels.linear_attention.hopper.one_pass_chunk import CHANNELS, FORWARD
from pallas_kernels.linear_attention.hopper.one_pass_walk import AHEAD, BF16, HOLDING, PREPARING, Walk

STAGES = 3
KEPT_STAGES = 2  # where results take room
HALVES = 2  # of the 128 channels
NEVER = 2.0**30


class OnePassed(NamedTuple):
    """o: [B, T, HV, V] bf16.  final: S^T after the last token [B, HV, V, K] float32; None if not wanted.

    first_wrong: [B, HV, 2 C] float32, the least of which is the token from which on the others are
    not to be used; `NEVER` if all are right.
    For the gradients, else None: states and values as in `forward_scan.Scanned`; norms as `prepare` says
    [B, HV, T/C, 3, C], carry: exp of the sums of log-decays of every 16 tokens [B, HV, T/C, 4, K], float32.
    """

    o: jax.Array
    first_wrong: jax.Array
    final: Any = None
    states: Any = None
    values: Any = None
    norms: Any = None
    carry: Any = None


@dataclasses.dataclass(frozen=True)
class OnePass(Walk):
    """One compiled pass; final: also return the last states.  keep: also what the gradients want."""

    final: bool
    keep: bool = False

    stages = property(lambda self: KEPT_STAGES if self.keep else STAGES)
    widths = property(lambda self: FORWARD._replace(half=self.half))

    def __call__(self) -> OnePassed:
        i = self.inputs
        batch, length, _, heads, *_ = i.sizes
        arrays = dict(v=i.v, initial=i.state)
        struct = jax.ShapeDtypeStruct
        tiles = batch, heads, length // C
        results = dict(
            o=struct(i.v.shape, BF16),
            first_wrong=struct((batch, heads, PREPARING * C), F32),
            final=struct((batch, heads, CHANNELS, CHANNELS), F32) if self.final else None,
        )
        scratch = dict(
            v=blocks.smem((HOLDING, AHEAD, C, C), BF16),
            o=blocks.smem((HOLDING, C, C), BF16),
        )
        if self.keep:
            results |= dict(
                states=struct((*tiles, CHANNELS, CHANNELS), BF16),
                values=struct(i.v.shape, BF16) if self.delta else None,
                norms=struct((*tiles, 3, C), F32),
                carry=struct((*tiles, C // ROWS, CHANNELS), F32),
            )
            scratch |= dict(
                states=blocks.smem((HOLDING, C, CHANNELS), BF16),
                kept=blocks.smem((HOLDING, C, C), BF16) if self.delta else None,
                norms=plgpu.SMEM((self.stages, 3, C), F32),
            )
        name = "one_pass" + "_kept" * self.keep
        return OnePassed(**self.launch(name, arrays, results, scratch, self.hold_state))

    def begin(self, at: SimpleNamespace, first_tile: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.full((C,), NEVER, F32), blocks.ROWS)

    def prepared(self, at: SimpleNamespace, n: Any, sizes: jax.Array, first: jax.Array) -> jax.Array:
        wrong = sizes > two_parts.LARGEST
        token = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=blocks.ROWS) + n * C
        return jnp.minimum(first, jnp.where(wrong, token.astype(F32), NEVER))

    def end(self, at: SimpleNamespace, first_tile: Any, first: jax.Array) -> None:
        at.refs.first_wrong.at[at.b, at.head, pl.ds(first_tile * C, C)][...] = first

    def hold_state(self, at: SimpleNamespace, wg: Any) -> None:
        smem, refs = at.smem, at.refs
        columns = pl.ds(wg * C, C)
        parts = [pl.ds(half * C, C) for half in range(HALVES)]
        initial = getattr(refs, "initial", None)
        state = tuple(blocks.state(initial, (C, C), (at.b, at.head, columns, part)) for part in parts)
        for n in range(min(AHEAD, at.tiles)):
            self.fetch(at, wg, n, n)

        def step(n: Any, state: tuple) -> tuple:
            for half, part in zip(state, parts, strict=True) if self.keep else ():
                blocks.store(smem.states.at[wg].at[:, part], half.astype(BF16))
            self.wait_for_tile(at, wg, n)
            if self.keep:
                plgpu.commit_smem()
                self.send_kept(at, wg, n)
            plgpu.wait_smem_to_gmem(1 if self.keep else 0, wait_read_only=True)
            for chunk in range(C // ROWS):
                state = self.advance(at, wg, n, chunk, state)
            if self.keep:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.release(at, wg, n)
            place = at.b, self.rows(at, n), at.head, columns
            if self.keep and self.delta:
                plgpu.copy_smem_to_gmem(smem.kept.at[wg], refs.values.at[place], commit_group=False)
            plgpu.copy_smem_to_gmem(smem.o.at[wg], refs.o.at[place])
            return state

        state = lax.fori_loop(0, at.count, step, state)
        if self.final:
            for part, x in zip(parts, state, strict=True):
                blocks.write(refs.final.at[at.b, at.head, columns, part], x)
        plgpu.wait_smem_to_gmem(0)

    def send_kept(self, at: SimpleNamespace, wg: Any, n: Any) -> None:
        """The state before a tile, and from one of the warpgroups the tile's norms and carry."""
        smem, refs, slot, tile = at.smem, at.refs, blocks.rem(n, self.stages), (at.b, at.head, n)

        @pl.when(wg == 0)
        def _() -> None:
            plgpu.copy_smem_to_gmem(smem.norms.at[slot], refs.norms.at[tile], commit_group=False)
            plgpu.copy_smem_to_gmem(smem.carry.at[slot], refs.carry.at[tile], commit_group=False)

        plgpu.copy_smem_to_gmem(smem.states.at[wg], refs.states.at[(*tile, pl.ds(wg * C, C))])

    def advance(self, at: SimpleNamespace, wg: Any, n: Any, chunk: int, state: tuple) -> tuple:
        """The state after a chunk, whose outputs go to shared memory."""
        i, smem = self.inputs, at.smem
        slot, tokens = blocks.rem(n, self.stages), pl.ds(chunk * ROWS, ROWS)
        parts = [pl.ds(half * C, C) for half in range(HALVES)]
        read_by = pl.ds(2 * chunk * ROWS, 2 * ROWS) if self.delta else pl.ds((2 * chunk + 1) * ROWS, ROWS)
        stacked = [smem.qk.at[slot].at[read_by, part].T for part in parts]
        pairs = list(zip((part.astype(BF16) for part in state), stacked, strict=True))
        value = blocks.tile(smem.v.at[wg, blocks.rem(n, AHEAD)].at[tokens].T, F32 if self.delta else BF16)
        if self.delta:
            beta = blocks.by_col(blocks.col_vector(smem.beta.at[slot].at[tokens]), (C, ROWS))
        (read,) = sums_of_products((pairs, (C, read_by.size)))
        made, values = smem.pairs.at[slot, chunk], value
        if self.delta:
            values = one_pass_tiles.values_of(read, value, beta, made, interpret=i.interpret)

        def finish() -> None:
            o = one_pass_tiles.outputs_of(read, values, made, interpret=i.interpret)
            blocks.store(smem.o.at[wg].at[tokens], o, transposed=True)
            if self.keep and self.delta:
                kept = smem.kept.at[wg].at[tokens]
                blocks.store(kept, values, transposed=True)

        carry = [blocks.by_col(blocks.col_vector(smem.carry.at[slot, chunk].at[part])) for part in parts]
        keys = [smem.g.at[slot].at[tokens, part] for part in parts]
        kept = [part * factor for part, factor in zip(state, carry, strict=True)]
        sums = [([(values, key)], part) for key, part in zip(keys, kept, strict=True)]
        return sums_of_products(*sums, meanwhile=finish)
