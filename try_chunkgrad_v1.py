"""The chunk gradients of channel_backward_chunks.py with channels as rows of every tile, tokens as columns.

The formulas are those of that module. Transposed, the scaled copies of q and k are left operands,
    rows:    dq^T = 2^D (k 2^-D)^T E^T        columns:  dk^T = 2^-D (q 2^D)^T E
so they go from the registers in which they are made into the product, without a tile in shared memory and
its barriers. E and F, the only right operands, serve 64 channels at once, sums over tokens are sums along
rows, and nothing is made in turns. q and k stay as they are: their norms are factors of E, F and the gates,
    E'_ij = n_i E_ij m_j,   F'_ij = m_i F_ij m_j     (n, m: norms of q, k by token)
and the tiles hold the gradients of raw q and k but for what l2norm takes out along them.

A warpgroup has 64 channels; the first also makes E, the last F. A further one issues copies. Results leave
through the buffers that q, k and (bfloat16) log-decays came in.
"""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, channel_math, chunk_math
from pallas_kernels.linear_attention.hopper.blocks import F32, C
from pallas_kernels.linear_attention.hopper.channel_backward_chunks import value_slices
from pallas_kernels.linear_attention.hopper.channel_tiles import NORM_K, NORM_Q, SPAN
from pallas_kernels.linear_attention.hopper.inputs import Inputs

BF16, F16 = jnp.bfloat16, jnp.float16
REGISTERS = (240, 24)  # a thread that works, that copies, with two warpgroups at work
TILE = (C, C)
ONES = 8  # columns of the least product


def chunk_gradients(
    inputs: Inputs,
    norms: jax.Array,
    carry: jax.Array,
    states: jax.Array,
    state_gradients: jax.Array,
    values: jax.Array,
    do: jax.Array,
    dv: jax.Array | None,
    *,
    run: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Arguments and results of `channel_backward_chunks.chunk_gradients`, dlog_decay always in bf16."""
    batch, length, heads, value_heads, key_dim, value_dim = inputs.sizes
    chunks, slices = length // C, value_slices(value_dim)
    workers, blocks_v = key_dim // C, value_dim // slices // C
    delta, documents = dv is not None, inputs.segment is not None
    arrays: dict[str, Any] = dict(q=inputs.q, k=inputs.k, decay=inputs.log_decay, u=values, do=do)
    arrays |= dict(h=states, g=state_gradients, norms=norms, carry=carry)
    arrays |= dict(dv=dv) | (dict(segment=inputs.segment, entering=inputs.entering) if documents else {})
    direct = arrays["decay"].dtype != BF16  # log-decays go through registers

    keys = jax.ShapeDtypeStruct((batch, length, value_heads * slices, key_dim), BF16)
    results = dict(dq=keys, dk=keys, d_decay=keys)
    results["error"] = jax.ShapeDtypeStruct((batch, value_heads * slices, length), F32) if delta else None
    flags = dict(delta=delta, documents=documents, direct=direct)
    sizes = dict(workers=workers, blocks_v=blocks_v)

    def body(refs: dict[str, Any], s: dict[str, Any]) -> None:
        summand, first = lax.axis_index("h"), lax.axis_index("n") * run
        wg, head = lax.axis_index("wg"), blocks.div(summand, slices)
        at = SimpleNamespace(
            b=lax.axis_index("b"),
            head=head,
            summand=summand,
            key_head=blocks.div(head, value_heads // heads),
            first=first,
            steps=jnp.minimum(run, chunks - first),
            first_value=blocks.rem(summand, slices) * (blocks_v * C),
            wg=wg,
            inputs=inputs,
            **flags,
            **sizes,
        )
        more, fewer = REGISTERS if workers == 2 else (0, 0)
        blocks.role(wg < workers, lambda: Worker(refs, s, at).run(), increase=more)
        blocks.role(wg == workers, lambda: issue_copies(refs, s, at), decrease=fewer)
        blocks.finish_together(s["done"])

    grid = dict(b=batch, h=value_heads * slices, n=pl.cdiv(chunks, run))
    name = ("delta_" if delta else "additive_") + "channel_gradients"
    out = blocks.launch(
        name, body, arrays, results, buffers(**flags, **sizes), grid, threads=workers + 1,
        interpret=inputs.interpret,
    )  # fmt: skip
    return out["dq"], out["dk"], out["d_decay"], out.get("error")


def buffers(*, workers: int, blocks_v: int, delta: bool, documents: bool, direct: bool) -> dict[str, Any]:
    """Buffers and barriers by name. workers: C channels of a key each.  blocks_v: of C channels of a value."""
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
        pairs=blocks.smem((2, C, C), BF16),  # E and F, additive the two parts of E
        # offsets from the middle = middle @ steps: of the whole chunk, of a finer level
        middle=blocks.smem((2, C, C), F16),
        later=blocks.smem(TILE, BF16),
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
        done=plgpu.Barrier(num_arrivals=workers + 1),
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


class Worker:
    """A warpgroup at work on the channels [wg C, wg C + C) of a block of threads' chunks."""

    def __init__(self, refs: dict[str, Any], s: dict[str, Any], at: SimpleNamespace) -> None:
        self.refs, self.s, self.at = refs, s, at
        self.interpret = at.inputs.interpret
        self.store = functools.partial(blocks.store, interpret=self.interpret)
        self.multiply = functools.partial(chunk_math.sums_of_products, interpret=self.interpret)
        self.sync = lambda: blocks.meet(s["both"])

    def run(self) -> None:
        s, at = self.s, self.at
        row, col = blocks.row_index(), blocks.col_index()

        @pl.when(at.wg == 0)
        def _() -> None:
            self.store(s["middle"].at[0], channel_math.middle_of(row, col, jnp.int32(C)))
            self.store(s["later"], jnp.where(row >= col, 1.0, 0.0).astype(BF16))
            self.store(s["ones"], (blocks.zeros((C, ONES)) + 1.0).astype(BF16), transposed=True)

        if at.direct:
            self.store_steps(self.load_decay(jnp.int32(0)))
        plgpu.commit_smem()
        self.sync()
        lax.fori_loop(0, at.steps, lambda i, _: self.chunk(i), None)
        self.results_have_left()
        plgpu.wait_smem_to_gmem(0)

    def results_have_left(self) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.s["left"])

    def chunk(self, i: Any) -> None:
        s, at = self.s, self.at
        self.i, self.slot = i, blocks.rem(i, 2)
        self.norms, self.seen_by = s["norms"].at[self.slot], 0
        plgpu.barrier_wait(s["numbers_filled"].at[self.slot])
        plgpu.barrier_wait(s["v_filled"])
        raw = [(which, self.raw_pairs(which)) for which in self.own_pairs()]
        pl.when(i > 0)(self.results_have_left)
        for which, x in raw:
            self.store_pairs(which, x)
        plgpu.commit_smem()
        self.sync()  # E and F are there
        if at.delta:
            target = self.refs["error"].at[at.b, at.summand, self.rows()]
            last = at.wg == at.workers - 1
            pl.when(last)(lambda: plgpu.copy_smem_to_gmem(s["rows"].at[1], target))
        sums, end = self.with_states()
        span = self.norms[SPAN, 0].astype(jnp.int32)
        _, *sums = lax.while_loop(
            lambda carried: (carried[0] >= span) & (carried[0] > 1),
            functools.partial(self.level, span),
            (jnp.int32(C), *sums),
        )
        self.finish(*sums, end)

    # What the next steps name. The 0 in it is unknown to the compiler and new each time: else it lifts the
    # addresses, descriptors and masks of a whole chunk to its start, and spills.

    def zero(self) -> jax.Array:
        self.seen_by += 1
        return jnp.minimum(self.norms[NORM_K, self.seen_by % C].astype(jnp.int32), 0)

    def own(self, name: str, *place: Any) -> Any:
        """The part of a buffer that has this warpgroup's channels."""
        return self.s[name].at[(*place, self.at.wg + self.zero())]

    def rows(self) -> Any:
        return pl.ds((self.at.first + self.i) * C, C)

    def by_token(self, ref: Any) -> jax.Array:
        return blocks.by_col(blocks.col_vector(ref), TILE)

    def own_pairs(self) -> list:
        return [self.at.wg] if self.at.workers == 2 else [jnp.int32(0), jnp.int32(1)]

    def load_decay(self, i: Any) -> jax.Array:
        rows, columns = pl.ds((self.at.first + i) * C, C), pl.ds(self.at.wg * C, C)
        source = self.refs["decay"].at[self.at.b, rows, self.at.head, columns]
        return plgpu.load(source, layout=blocks.WGMMA, optimized=False)

    def store_steps(self, decay: jax.Array) -> None:
        self.store(self.s["decay"].at[0, self.at.wg], channel_math.steps(decay.astype(F32)))

    def steps(self) -> jax.Array:
        """Log-decays in base 2, float16, [channel, token]."""
        if self.at.direct:
            return blocks.tile(self.own("decay", 0).T, F16)
        return channel_math.steps(blocks.tile(self.own("decay", self.slot).T))

    def offsets(self, steps: jax.Array, level: Any) -> tuple:
        """The product for sums of log-decays from the middle of a token's block to it."""
        return [(steps, self.s["middle"].at[level + self.zero()].T)], TILE

    # E and F

    def raw_pairs(self, which: Any) -> jax.Array:
        """dO U^T (additive: for both parts), dV U^T."""
        over, zero = range(self.at.blocks_v), self.zero()
        d = self.s["d"].at[which + zero if self.at.delta else zero]
        products = [(d.at[j], self.s["u"].at[zero + j].T) for j in over]
        return self.multiply((products, TILE))[0]

    def store_pairs(self, which: Any, raw: jax.Array) -> None:
        """E' (first), F' strictly below the diagonal; the diagonal apart. Additive: the two parts of E'."""
        s, at = self.s, self.at
        row, col = blocks.row_index() + self.zero(), blocks.col_index()
        second = which.astype(F32)
        norm_q, norm_k = (blocks.row_vector(self.norms.at[name]) for name in (NORM_Q, NORM_K))
        of_row = norm_q if not at.delta else norm_q + second * (-norm_k - norm_q)
        diagonal = jnp.sum(jnp.where(row == col, raw, 0.0), axis=1)
        s["rows"].at[which][...] = diagonal * jnp.where(which == 0, norm_q * norm_k, 1.0)
        keep = row > col
        if at.documents:
            ids = s["segment"].at[self.slot, 0]
            keep = keep & (blocks.by_row(blocks.row_vector(ids)) == self.by_token(ids))
        x = jnp.where(keep, raw * blocks.by_row(of_row) * self.by_token(self.norms.at[NORM_K]), 0.0)
        if not at.delta:
            x = x - rounded(x).astype(F32) * second
        self.store(s["pairs"].at[which], x.astype(BF16))

    def halve(self, size: Any) -> None:
        """E and F without the pairs, `middle` for blocks of `size` tokens."""
        row, col = blocks.row_index() + self.zero(), blocks.col_index()
        for which in self.own_pairs():
            ref = self.s["pairs"].at[which]
            self.store(ref, jnp.where((row ^ col) < size, blocks.tile(ref), 0.0).astype(BF16))
        middle = self.s["middle"].at[1]
        pl.when(self.at.wg == 0)(lambda: self.store(middle, channel_math.middle_of(row, col, size)))
        plgpu.commit_smem()

    # The gradients of q and k (as row, as column of pairs), [channel, token]

    def with_states(self) -> tuple[tuple, jax.Array]:
        """What the states give, and the gradient of G_C by channel."""
        s, at, zero = self.s, self.at, self.zero()
        over = range(at.blocks_v)
        if not at.direct:
            plgpu.barrier_wait(s["decay_filled"].at[self.slot])
        steps = self.steps()
        sum_where = lambda keep: jnp.sum(jnp.where(keep, steps.astype(F32), 0.0), axis=1)
        early, late = (sum_where((blocks.col_index() < C // 2) == first) for first in (True, False))
        plgpu.barrier_wait(s["h_filled"])
        h, g = ([self.own(name).at[zero + j] for j in over] for name in "hg")
        d = [[s["d"].at[zero + which, j].T for j in over] for which in range(1 + at.delta)]
        u = [s["u"].at[zero + j].T for j in over]
        product = lambda x, y: ([(a.T, b) for a, b in zip(x, y, strict=True)], TILE)
        offset, dq, written, *seen = self.multiply(
            self.offsets(steps, 0), product(h, d[0]), product(g, u), *[product(h, x) for x in d[1:]]
        )
        plgpu.commit_smem()  # all have read the values and the states
        plgpu.barrier_arrive(s["v_free"])
        for x, y in zip(h, g, strict=True):
            self.store(x, blocks.tile(x, BF16) * blocks.tile(y, BF16))
        plgpu.commit_smem()
        (kept,) = self.multiply(([(x.T, s["ones"].T) for x in h], (C, ONES)))
        plgpu.commit_smem()
        plgpu.barrier_arrive(s["h_free"])
        carry = blocks.row_vector(s["carry"].at[self.slot, pl.ds((at.wg + self.zero()) * C, C)])
        end = jnp.sum(kept, axis=1) * (carry * (1.0 / ONES))

        def norm(which: int, document: Any) -> jax.Array:
            """Norms of the tokens of a document, 0 elsewhere."""
            x = blocks.col_vector(self.norms.at[which])
            if at.documents:
                ids = blocks.col_vector(s["segment"].at[self.slot, 0])
                x = jnp.where(ids == document, x, 0.0)
            return blocks.by_col(x, TILE)

        entering = s["segment"][self.slot, 1, 0] if at.documents else None
        leaving = s["segment"][self.slot, 0, C - 1] if at.documents else None
        read = jnp.exp2(offset + blocks.by_row(early))
        dq = dq * (read * norm(NORM_Q, entering))
        seen = seen[0] * (read * norm(NORM_K, entering)) * -1.0 if at.delta else blocks.zeros(TILE)
        written = written * (jnp.exp2(blocks.by_row(late) - offset) * norm(NORM_K, leaving))
        plgpu.barrier_wait(s["qk_filled"])
        k = blocks.tile(self.own("k").T)
        end = end + jnp.sum(jnp.where(blocks.col_index() < C - 1, k * written, 0.0), axis=1)
        return (pinned(dq), pinned(seen), written), pinned(end)

    def level(self, span: Any, carried: tuple) -> tuple:
        """The pairs across the middles of blocks of some size, or (finest) all that are left in them."""
        size, dq, dk_row, dk_col = carried
        delta, which = self.at.delta, (size < C).astype(jnp.int32)
        (offset,) = self.multiply(self.offsets(self.steps(), which))
        finest = (size == span) & (size > 2)  # blocks of 2 have one pair
        late = ((blocks.col_index() + self.zero()) & (size >> 1)) != 0
        up = lambda: jnp.exp2(jnp.where(finest | late, pinned(offset), -jnp.inf))
        down = lambda: jnp.exp2(jnp.where(finest | ~late, pinned(offset) * -1.0, -jnp.inf))
        tile = lambda name: blocks.tile(self.own(name).T)
        pair = lambda: [self.s["pairs"].at[self.zero() + n] for n in range(2)]

        def times(parts: list, matrices: list) -> list:
            """Operands of a tile in two parts times E or F; additive: times the two parts of E."""
            if delta:
                return [(x, matrices[0]) for x in parts]
            return [(parts[0], matrices[0]), (parts[1], matrices[0]), (parts[0], matrices[1])]

        parts = two_parts(tile("k") * down())
        (found,) = self.multiply((times(parts, [x.T for x in pair()]), TILE))
        dq = pinned(dq + up() * found)
        if delta:
            (found,) = self.multiply((times(parts, [pair()[1].T]), TILE))
            dk_row = pinned(dk_row + up() * found)
        (found,) = self.multiply((times(two_parts(tile("q") * up()), pair()), TILE))
        if delta:
            (found,) = self.multiply((times(two_parts(tile("k") * up()), pair()[1:]), found))
        dk_col = pinned(dk_col + down() * found)

        @pl.when(~finest & (size > 2))
        def _() -> None:  # only pairs within half a block are left
            self.sync()
            self.halve(size >> 1)
            self.sync()

        return size >> 1, dq, dk_row, dk_col

    def finish(self, dq: jax.Array, dk_row: jax.Array, dk_col: jax.Array, end: jax.Array) -> None:
        """dlog_decay, the pairs of a token with itself, l2norm; results leave."""
        s, at, refs = self.s, self.at, self.refs
        following = self.load_decay(jnp.minimum(self.i + 1, at.steps - 1)) if at.direct else None
        q_s, k_s = self.own("q"), self.own("k")
        tile = lambda name: blocks.tile(self.own(name).T)
        lost = jnp.where(blocks.col_index() + self.zero() < C - 1, dk_col, 0.0)
        d_sum = tile("q") * dq + tile("k") * (dk_row - lost)
        d_decay = [(x, s["later"]) for x in two_parts(pinned(d_sum))], blocks.by_row(end)
        own = lambda: self.by_token(s["rows"].at[self.zero()])
        dk = pinned(dk_row + dk_col + own() * tile("q"))
        dq = pinned(dq + own() * tile("k"))
        (d_decay,) = self.multiply(d_decay)
        d_decay = rounded(d_decay)
        q, k = (rounded(blocks.tile(x.T, BF16)) for x in (q_s, k_s))
        if at.inputs.l2norm:
            plgpu.commit_smem()  # all have read q and k
            for ref, x, d in ((q_s, q, dq), (k_s, k, dk)):
                self.store(ref, (pinned(x).astype(F32) * d).astype(BF16), transposed=True)
            plgpu.commit_smem()
            along = self.multiply(*[([(x, s["ones"].T)], (C, ONES)) for x in (q_s, k_s)])
            for n, x in enumerate(along):
                s["rows"].at[2 + n * at.workers + at.wg][...] = jnp.sum(x, axis=1) * (1.0 / ONES)
        plgpu.commit_smem()
        self.sync()  # E, F and their diagonal may be overwritten, and the inner products are there
        if at.inputs.l2norm:
            dq = dq - pinned(q).astype(F32) * self.along(0, NORM_Q, 1 / at.inputs.scale)
            dk = dk - pinned(k).astype(F32) * self.along(1, NORM_K, 1.0)
        if at.direct:
            self.store_steps(following)
        d_s = self.own("d_decay") if at.direct else self.own("decay", self.slot)
        for name, ref, x in (("dq", q_s, dq), ("dk", k_s, dk), ("d_decay", d_s, d_decay)):
            self.store(ref, x.astype(BF16), transposed=True)
        plgpu.commit_smem()
        columns = pl.ds(at.wg * C, C)
        for name, ref in (("dq", q_s), ("dk", k_s), ("d_decay", d_s)):
            plgpu.copy_smem_to_gmem(ref, refs[name].at[at.b, self.rows(), at.summand, columns])

    def along(self, which: int, norm: int, factor: float) -> jax.Array:
        """x.dx / |x|^2 of each token's q or k; factor / |x| are the norms."""
        row = 2 + which * self.at.workers
        norm = blocks.col_vector(self.norms.at[norm]) * factor
        total = sum(blocks.col_vector(self.s["rows"].at[row + w]) for w in range(self.at.workers))
        return blocks.by_col(total * norm * norm, TILE)


def pinned(x: jax.Array) -> jax.Array:
    """x, which the compiler makes here and of which it forgets the origin: else it makes sums where they are
    used and keeps their summands, or keeps both a factor and its inverse."""
    return lax.optimization_barrier(x)


def rounded(x: jax.Array) -> jax.Array:
    """bf16 pairs; pinned, a way back to float32 does not become a slow conversion of each."""
    return pinned(x.astype(BF16))


def two_parts(x: jax.Array) -> list[jax.Array]:
    """x as the sum of two bf16 tiles."""
    high = rounded(x)
    return [high, (x - high.astype(F32)).astype(BF16)]
