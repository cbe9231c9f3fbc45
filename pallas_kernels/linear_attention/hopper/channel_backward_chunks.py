"""The gradients of q, k, log_decay and beta with a decay per key channel: no chunk waits for another.

With S the state that enters a chunk, dS the gradient of the one that leaves, U = V' (additive: V), dV from
the reverse scan, q and k normalised and q scaled, e = exp(G) and f = exp(G_C - G) with their masks (now a
number per token and channel), and E = tril(dO U^T), F = -(dV U^T, j < i) on pairs of one document,
    dq = e (dO S^T) + [rows of E with k]
    dk = -e (dV S^T) + [rows of F with k] + f (U dS^T) + [columns of E with q and of F with k]
    dlog_decay_t = sum_{i >= t} dG_i,    dG_C += sum_i k_i (f U dS^T)_i + exp(G_C) <S, dS>
where a pair (i, j) has the factor exp(G_i - G_j) in every channel, made as in `channel_math`. dbeta_i =
dV_i.U_i / beta_i^2 is the diagonal of dV U^T. docs/kernels_channel.md, section 7, says why it is made so:

- Channels are the rows of every tile, tokens its columns: scaled copies of q and k are left operands, made
  in registers.  Norms are factors of E, F and the gates: E'_ij = n_i E_ij m_j, F'_ij = m_i F_ij m_j (n, m:
  norms of q, k by token), so that the sums are the gradients of q and k as they are, but for what l2norm
  takes out.
- dG is what a row gains with exp(G_i), times q_i or k_i, less what a column loses with exp(-G_j), times
  k_j. The diagonal of E has no decay and stays out, and so does the last token's f = 1.

A warpgroup has 64 channels; the first also makes E, the last F. A further one issues copies
(channel_backward_copies.py). Results leave through the buffers that q, k and bf16 log-decays came in.
"""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, channel_math, one_pass_steps
from pallas_kernels.linear_attention.hopper.blocks import BF16, F32, C
from pallas_kernels.linear_attention.hopper.channel_backward_copies import HALF, ONES, buffers, issue_copies
from pallas_kernels.linear_attention.hopper.channel_backward_pairs import (
    HALF_TILE,
    TILE,
    Pairs,
    halves,
    pinned,
    rounded,
    two_parts,
)
from pallas_kernels.linear_attention.hopper.channel_tiles import NORM_K, NORM_Q, SPAN, ChannelSaved
from pallas_kernels.linear_attention.hopper.inputs import Inputs

REGISTERS = (240, 24)  # a thread that works, that copies, with two warpgroups at work


def value_slices(value_dim: int) -> int:
    """Slices of V that the kernel takes one by one."""
    return value_dim // (min(value_dim, 2 * C) if value_dim % (2 * C) == 0 else C)


def chunk_gradients(
    inputs: Inputs,
    saved: ChannelSaved,
    state_gradients: jax.Array,
    do: jax.Array,
    dv: jax.Array | None,
    *,
    run: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """dq, dk, dlog_decay [B, T, N, K] bf16, dV.U [B, N, T] float32 (delta), N of HV, slices.

    Shared memory holds 128 values of a head: of a wider one every slice (of 128 or 64) adds a summand.
    Log-decays may be those of `one_pass_steps.as_read`.
    state_gradients: [B, HV, T/C, V, K] bf16.  do, dv: [B, T, HV, V] bf16; dv None: additive.  run: chunks one
    block of threads takes in turn.
    """
    batch, length, heads, value_heads, key_dim, value_dim = inputs.sizes
    chunks, slices = length // C, value_slices(value_dim)
    workers, blocks_v = key_dim // C, value_dim // slices // C
    delta, documents = dv is not None, inputs.segment is not None
    decay, half = one_pass_steps.in_bf16(inputs), one_pass_steps.half(inputs)
    values = inputs.v if saved.values is None else saved.values
    arrays: dict[str, Any] = dict(q=inputs.q, k=inputs.k, decay=decay, u=values, do=do)
    arrays |= dict(h=saved.states, g=state_gradients, norms=saved.tiles.norms, carry=saved.tiles.carry)
    arrays |= dict(dv=dv) | (dict(segment=inputs.segment, entering=inputs.entering) if documents else {})
    direct = arrays["decay"].dtype != BF16  # log-decays go through registers

    keys = jax.ShapeDtypeStruct((batch, length, value_heads * slices, key_dim), BF16)
    results: dict[str, Any] = dict(dq=keys, dk=keys, d_decay=keys)
    results["error"] = jax.ShapeDtypeStruct((batch, value_heads * slices, length), F32) if delta else None
    flags: dict[str, Any] = dict(delta=delta, documents=documents, direct=direct)
    sizes: dict[str, Any] = dict(workers=workers, blocks_v=blocks_v)

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
            half=half,
            **flags,
            **sizes,
        )
        more, fewer = REGISTERS if workers == 2 else (0, 0)
        blocks.role(wg < workers, lambda: Worker(refs, s, at).run(), increase=more)
        blocks.role(wg == workers, lambda: issue_copies(refs, s, at), decrease=fewer)

    grid = dict(b=batch, h=value_heads * slices, n=pl.cdiv(chunks, run))
    name = ("delta_" if delta else "additive_") + "channel_gradients" + "_half" * half
    out = blocks.launch(
        inputs, name, body, arrays, results, buffers(**flags, **sizes), grid, threads=workers + 1
    )
    return out["dq"], out["dk"], out["d_decay"], out.get("error")


class Worker(Pairs):
    """A warpgroup at work on the channels [wg C, wg C + C) of a block of threads' chunks."""

    def run(self) -> None:
        s, at = self.s, self.at
        row, col = blocks.row_index(), blocks.col_index()

        @pl.when(at.wg == 0)
        def _() -> None:
            self.store(s["middle"].at[0], channel_math.middle_of(row, col, jnp.int32(C)))
            self.store(s["later"], jnp.where(row >= col, 1.0, 0.0).astype(BF16), width=HALF)
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
        sums: tuple
        sums, end = self.with_states()
        span = self.norms[SPAN, 0].astype(jnp.int32)
        _, sums = lax.while_loop(
            lambda carried: (carried[0] >= span) & (carried[0] > 1),
            functools.partial(self.level, span),
            (jnp.int32(C), sums),
        )
        self.finish(sums, end)

    def rows(self) -> Any:
        return pl.ds((self.at.first + self.i) * C, C)

    def load_decay(self, i: Any) -> jax.Array:
        rows, columns = pl.ds((self.at.first + i) * C, C), pl.ds(self.at.wg * C, C)
        source = self.refs["decay"].at[self.at.b, rows, self.at.head, columns]
        return plgpu.load(source, layout=blocks.WGMMA, optimized=False)

    def store_steps(self, decay: jax.Array) -> None:
        self.store(self.s["decay"].at[0, self.at.wg], channel_math.steps(decay.astype(F32)))

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
        offset, read, written, *rest = self.multiply(
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
        decay = jnp.exp2(offset + blocks.by_row(early))
        read = read * (decay * norm(NORM_Q, entering))
        seen = rest[0] * (decay * norm(NORM_K, entering)) * -1.0 if at.delta else blocks.zeros(TILE)
        written = written * (jnp.exp2(blocks.by_row(late) - offset) * norm(NORM_K, leaving))
        plgpu.barrier_wait(s["qk_filled"])
        k = blocks.tile(self.own("k").T)
        end = end + jnp.sum(jnp.where(blocks.col_index() < C - 1, k * written, 0.0), axis=1)
        return tuple(pinned(halves(x)) for x in (read, seen, written)), pinned(end)

    def finish(self, sums: tuple, end: jax.Array) -> None:
        """dlog_decay, the pairs of a token with itself, l2norm; results leave."""
        q_sum, row_sum, column_sum = sums
        s, at, refs = self.s, self.at, self.refs
        q_s, k_s = self.own("q"), self.own("k")
        half_of = lambda ref, i: ref.at[pl.ds(i * HALF, HALF)]
        parts, found = [], []
        for i in (0, 1):
            lost = column_sum[i]
            if i == 1:  # the last token's write does not decay
                lost = jnp.where(halves(blocks.col_index())[i] + self.zero() < C - 1, lost, 0.0)
            d_sum = self.half("q", i) * q_sum[i] + self.half("k", i) * (row_sum[i] - lost)
            parts.append(two_parts(pinned(d_sum)))
            dk = pinned(row_sum[i] + column_sum[i] + self.diagonal(i) * self.half("q", i))
            found.append((pinned(q_sum[i] + self.diagonal(i) * self.half("k", i)), dk))
        later = [(x, half_of(s["later"], i)) for i in (0, 1) for x in parts[i]]
        d_decay = rounded(self.multiply((later, blocks.by_row(end)))[0])
        q, k = ([rounded(self.half(name, i, BF16)) for i in (0, 1)] for name in "qk")
        if at.inputs.l2norm:
            plgpu.commit_smem()  # all have read q and k
            for i in (0, 1):
                for ref, x, d in zip((q_s, k_s), (q, k), found[i], strict=True):
                    self.store(half_of(ref, i), (pinned(x[i]).astype(F32) * d).astype(BF16), transposed=True)
            plgpu.commit_smem()
            along = self.multiply(*[([(x, s["ones"].T)], (C, ONES)) for x in (q_s, k_s)])
            for n, inner in enumerate(along):
                s["rows"].at[2 + n * at.workers + at.wg][...] = jnp.sum(inner, axis=1) * (1.0 / ONES)
        plgpu.commit_smem()
        self.sync()  # E, F and their diagonal may be overwritten, and the inner products are there
        for i in (0, 1):
            dq, dk = found[i]
            if at.inputs.l2norm:
                dq = dq - pinned(q[i]).astype(F32) * self.along(i, 0, NORM_Q, 1 / at.inputs.scale)
                dk = dk - pinned(k[i]).astype(F32) * self.along(i, 1, NORM_K, 1.0)
            for ref, x in ((q_s, dq), (k_s, dk)):
                self.store(half_of(ref, i), x.astype(BF16), transposed=True)
        d_s = self.own("d_decay") if at.direct else self.own("decay", self.slot)
        self.store(d_s, d_decay, transposed=True)
        if at.direct:
            self.store_steps(self.load_decay(jnp.minimum(self.i + 1, at.steps - 1)))
        plgpu.commit_smem()
        columns = pl.ds(at.wg * C, C)
        for name, ref in (("dq", q_s), ("dk", k_s), ("d_decay", d_s)):
            plgpu.copy_smem_to_gmem(ref, refs[name].at[at.b, self.rows(), at.summand, columns])

    def diagonal(self, half: int) -> jax.Array:
        """That of E', of half of the tokens."""
        row = self.s["rows"].at[self.zero(), pl.ds(half * HALF, HALF)]
        return blocks.by_col(blocks.col_vector(row), HALF_TILE)

    def along(self, half: int, which: int, norm: int, factor: float) -> jax.Array:
        """x.dx / |x|^2 of q or k of half of the tokens; factor / |x| are the norms."""
        tokens = pl.ds(half * HALF, HALF)
        of = lambda w: self.s["rows"].at[2 + which * self.at.workers + w + self.zero(), tokens]
        inverse = blocks.col_vector(self.norms.at[norm, tokens]) * factor
        total: Any = sum(blocks.col_vector(of(w)) for w in range(self.at.workers))
        return blocks.by_col(total * inverse * inverse, HALF_TILE)
