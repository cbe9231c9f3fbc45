"""What the kernels in one pass over a sequence share: warpgroups that copy and prepare tiles of 64 tokens.

A block of threads walks a sequence of one value head, forward (one_pass.py) or from its end
(one_pass_reverse.py). Two warpgroups hold 64 values by K each of the state, or of its gradient; the others
prepare every other tile (one_pass_prepare.py), a tile or two ahead.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, one_pass_steps, one_pass_tiles
from pallas_kernels.linear_attention.hopper.blocks import F32, C
from pallas_kernels.linear_attention.hopper.inputs import Inputs
from pallas_kernels.linear_attention.hopper.inverse import ROWS
from pallas_kernels.linear_attention.hopper.one_pass_chunk import CHANNELS, Raw, Tile, Widths
from pallas_kernels.linear_attention.hopper.one_pass_prepare import prepare

BF16 = jnp.bfloat16
STATE, PREPARE = 152, 104  # registers a thread: 65,536 in all, in steps of 8
AHEAD = 2  # tiles of values
HOLDING, PREPARING = 2, 2  # warpgroups: with 64 values each; with every other tile each


@dataclasses.dataclass(frozen=True)
class Walk:
    """inputs: with log-decays of `one_pass_steps.as_read`, K = V = 128; delta rule, or additive (beta None).

    count: None or how many tiles of a head are walked, at least two, [B, HV] int32; of the others, and of
    what comes at the end, results are undefined.
    """

    inputs: Inputs
    count: jax.Array | None

    @property
    def stages(self) -> int:
        """Tiles of keys in shared memory."""
        raise NotImplementedError  # each pass has its own; so are the widths

    @property
    def widths(self) -> Widths:
        raise NotImplementedError

    @property
    def delta(self) -> bool:
        return self.inputs.beta is not None

    @property
    def half(self) -> bool:
        """Whether log-decays are float16."""
        return one_pass_steps.half(self.inputs)

    @property
    def turns(self) -> int:
        """A place, and who prepares in it: each waits at every phase of a barrier."""
        return self.stages * PREPARING

    @property
    def keys(self) -> dict[str, Any]:
        """The arrays that tiles are prepared from."""
        i = self.inputs
        assert i.k.shape[3] == i.v.shape[3] == CHANNELS
        steps, starts = one_pass_steps.in_bf16(i), one_pass_steps.starts(i, ROWS)
        assert steps.dtype == BF16
        return dict(q=i.q, k=i.k, g=steps, beta=i.beta, starts=starts, count=self.count)

    def launch(self, name: str, arrays: dict, results: dict, scratch: dict, hold: Callable) -> dict[str, Any]:
        """Results by name.  hold(at, wg): what a warpgroup with state does; scratch: what that wants."""
        i = self.inputs
        batch, length, heads, value_heads, *_ = i.sizes
        stages, turns, documents = self.stages, self.turns, i.segment is not None
        scratch = scratch | dict(
            qk=blocks.smem((stages, 2 * C, CHANNELS), BF16, width=self.widths.qk),  # of each chunk k, then q
            g=blocks.smem((stages, C, CHANNELS), BF16, width=self.widths.g),  # then what is written
            carry=plgpu.SMEM((stages, C // ROWS, CHANNELS), F32),
            pairs=one_pass_tiles.pairs(stages),
            beta=plgpu.SMEM((stages, C), F32) if self.delta else None,
            starts=plgpu.SMEM((stages, C), F32) if documents else None,
            filled=plgpu.Barrier(
                num_arrivals=2 * (C // ROWS) + 1 + self.delta + documents, num_barriers=turns
            ),
            values=plgpu.Barrier(num_barriers=HOLDING * AHEAD),
            ready=plgpu.Barrier(num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=HOLDING, num_barriers=turns),
        )

        def body(refs: dict[str, Any], smem: dict[str, Any]) -> None:
            b, head, wg = (lax.axis_index(name) for name in ("b", "h", "wg"))
            at = SimpleNamespace(refs=SimpleNamespace(**refs), smem=SimpleNamespace(**smem), b=b, head=head)
            at.tiles, at.key_head = length // C, blocks.div(head, value_heads // heads)
            at.count = at.tiles if self.count is None else refs["count"][b, head]
            blocks.role(wg < HOLDING, lambda: hold(at, wg), increase=STATE)
            blocks.role(wg >= HOLDING, lambda: self.prepare_tiles(at, wg - HOLDING), decrease=PREPARE)

        name = (
            ("delta" if self.delta else "additive")
            + "_channel_"
            + name
            + "_half" * self.half
            + "_documents" * documents
        )
        return blocks.launch(
            i, name, body, arrays | self.keys, results, scratch, dict(b=batch, h=value_heads),
            threads=HOLDING + PREPARING,
        )  # fmt: skip

    def tile(self, at: SimpleNamespace, n: Any) -> Any:
        """The tile walked as the n-th."""
        return n

    def begin(self, at: SimpleNamespace, first_tile: Any) -> Any:
        """What a warpgroup that prepares carries from tile to tile."""
        return jnp.int32(0)

    def prepared(self, at: SimpleNamespace, n: Any, sizes: jax.Array, carried: Any) -> Any:
        """When the n-th tile is prepared; sizes: what `prepare` returns."""
        return carried

    def end(self, at: SimpleNamespace, first_tile: Any, carried: Any) -> None:
        """When the last tile is prepared."""

    def rows(self, at: SimpleNamespace, n: Any) -> Any:
        return pl.ds(self.tile(at, n) * C, C)

    def copy_keys(self, at: SimpleNamespace, n: Any, slot: Any) -> None:
        smem, refs = at.smem, at.refs
        barrier = smem.filled.at[blocks.rem(n, self.turns)]
        rows = self.rows(at, n)

        self.wait_for_room(at, n)
        for chunk in range(C // ROWS):
            for which, source in enumerate((refs.k, refs.q)):
                tokens = pl.ds(self.tile(at, n) * C + chunk * ROWS, ROWS)
                target = smem.qk.at[slot, pl.ds((2 * chunk + which) * ROWS, ROWS)]
                plgpu.copy_gmem_to_smem(source.at[at.b, tokens, at.key_head], target, barrier)
        plgpu.copy_gmem_to_smem(refs.g.at[at.b, rows, at.head], smem.g.at[slot], barrier)
        if self.delta:
            plgpu.copy_gmem_to_smem(refs.beta.at[at.b, at.head, rows], smem.beta.at[slot], barrier)
        if hasattr(smem, "starts"):
            plgpu.copy_gmem_to_smem(refs.starts.at[at.b, rows], smem.starts.at[slot], barrier)

    def raw(self, at: SimpleNamespace, n: Any) -> Raw:
        refs, rows, key_heads = at.refs, self.rows(at, n), self.inputs.k.shape[2]
        k, q = (x.at[at.b, rows, at.key_head] for x in (refs.k, refs.q))
        strides = 2 * CHANNELS * key_heads, 2 * CHANNELS * self.inputs.v.shape[2]
        return Raw(k, q, refs.g.at[at.b, rows, at.head], strides)

    def wait_for_room(self, at: SimpleNamespace, n: Any) -> None:
        """Until the tile that was in a tile's place has been used."""

        @pl.when(n >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(at.smem.free.at[blocks.rem(n - self.stages, self.turns)])

    def prepare_tiles(self, at: SimpleNamespace, first_tile: Any) -> None:
        i, smem = self.inputs, at.smem

        def step(again: Any, carried: Any) -> Any:
            n = again * PREPARING + first_tile
            slot, turn = blocks.rem(n, self.stages), blocks.rem(n, self.turns)
            self.copy_keys(at, n, slot)
            plgpu.barrier_wait(smem.filled.at[turn])
            tile = Tile(
                **{name: getattr(smem, name).at[slot] for name in Tile._fields if hasattr(smem, name)}
            )
            sizes = prepare(
                tile, self.raw(at, n), self.widths, l2norm=i.l2norm, scale=i.scale, interpret=i.interpret
            )
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem.ready.at[slot])
            return self.prepared(at, n, sizes, carried)

        count = blocks.div(at.count - first_tile + PREPARING - 1, PREPARING)
        self.end(at, first_tile, lax.fori_loop(0, count, step, self.begin(at, first_tile)))

        @pl.loop(count, count + -(-self.stages // PREPARING))
        def _(again: Any) -> None:
            n = again * PREPARING + first_tile
            pl.when(n < at.count + self.stages)(functools.partial(self.wait_for_room, at, n))

    def fetch(self, at: SimpleNamespace, wg: Any, n: Any, own: Any) -> None:
        """Starts the copy of the n-th tile of values, in `refs.v`, to one of `AHEAD` places."""
        source = at.refs.v.at[at.b, self.rows(at, n), at.head, pl.ds(wg * C, C)]
        plgpu.copy_gmem_to_smem(source, at.smem.v.at[wg, own], at.smem.values.at[AHEAD * wg + own])

    def wait_for_tile(self, at: SimpleNamespace, wg: Any, n: Any) -> None:
        plgpu.barrier_wait(at.smem.values.at[AHEAD * wg + blocks.rem(n, AHEAD)])
        plgpu.barrier_wait(at.smem.filled.at[blocks.rem(n, self.turns)])
        plgpu.barrier_wait(at.smem.ready.at[blocks.rem(n, self.stages)])

    def release(self, at: SimpleNamespace, wg: Any, n: Any) -> None:
        """When a warpgroup has used the n-th tile."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(at.smem.free.at[blocks.rem(n, self.turns)])
        pl.when(n + AHEAD < at.count)(lambda: self.fetch(at, wg, n + AHEAD, blocks.rem(n, AHEAD)))
