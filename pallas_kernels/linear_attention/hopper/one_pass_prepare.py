"""What chunks of 16 tokens read of q, k and the log-decays in one_pass*.py: four at a time, a warp each.

A warp touches its own chunk only, and sixteen channels at a time stay in its registers from the tiles that
came to the tiles that go, as operands of the products of pairs too: no barrier, and nothing is read twice but
q and k for their norms. Norms are the diagonals of products, and sums of log-decays products with a triangle.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.linear_attention.call import L2NORM_EPS
from pallas_kernels.linear_attention.hopper import blocks, channel_math, inverse
from pallas_kernels.linear_attention.hopper.blocks import F32, LOG2E, C
from pallas_kernels.linear_attention.hopper.channel_tiles import SPAN
from pallas_kernels.linear_attention.hopper.inverse import ROWS, i32, integer
from pallas_kernels.linear_attention.hopper.one_pass_chunk import CHANNELS, LEAST, Chunk, Raw, Tile, Widths
from pallas_kernels.linear_attention.hopper.one_pass_tiles import BF16, INVERSE, SCORES, packed

RANGE = channel_math.RANGE


def prepare(tile: Tile, raw: Raw, widths: Widths, *, l2norm: bool, scale: float, interpret: Any) -> jax.Array:
    """Makes x = k exp G, z = scale q exp G and k exp(G_C - G) in place, the carry exp(G_C), and the pairs:

    A - I, A = (I + L)^-1, L_ij = beta_i x_i.y_j, y = k exp -G, and the scores z_i.y_j for j < i; their
    diagonal, most of o where gates are steep, is made of q and k before they are rounded.
    In reverse -x in the place of x, and the pairs are to be read transposed. Additive: no x and no A.
    If `norms` is there, 1 / |k| and scale / |q| go to it, and of each token the least, over channels, of G in
    base 2 or, of a chunk's last eight tokens, of the sum of the last eight log-decays.
    If `starts` is there, all of these are 0 where they would reach over a document's start.
    Returns beta |k|^2 of each token [64] float32.

    Where G falls below -`RANGE` pairs are made again, level by level: at level s the keys whose -G is from s
    to s + 1 times `RANGE`, with the tokens after, both scaled by 2^(s RANGE). Every pair is in one level,
    and what underflows is below 2^-30. Levels are of tokens: so rows do not depend on later ones, in no bit.
    """
    if interpret:
        return _interpreted(tile, l2norm, scale, widths)
    arranged = [(plgpu.TilingTransform((8, n)), plgpu.SwizzleTransform(2 * n)) for n in widths[:2]]
    given = blocks.present(tile._asdict())
    refs = *map(plgpu.RefType, arranged), *[plgpu.RefType()] * (len(given) + 1)
    numbers = plgpu.ShapeDtypeStruct((C,), F32, layout=blocks.ROWS)

    @plgpu.inline_mgpu(arg_types=refs, return_type=numbers)
    def run(_: Any, *refs: Any) -> Any:
        named = dict(zip(given, refs[:-3], strict=True))
        chunk = Chunk(Tile(**named), raw._replace(**dict(zip("kqg", refs[-3:], strict=True))), widths)
        return _by_token(_prepare(chunk, l2norm, scale))

    return run(*given.values(), *raw[:3])


def _interpreted(tile: Tile, l2norm: bool, scale: float, widths: Widths) -> jax.Array:
    k, q = jnp.moveaxis(tile.qk[...].reshape(4, 2, ROWS, CHANNELS).astype(F32), 1, 0)
    product = lambda a, b: jnp.einsum("wic,wjc->wij", a, b, precision=lax.Precision.HIGHEST)
    if widths.half:
        steps, base = lax.bitcast_convert_type(tile.g[...], jnp.float16).astype(F32), 1.0
    else:
        steps, base = jnp.maximum(tile.g[...], jnp.asarray(LEAST, BF16)).astype(F32), LOG2E
    triangle, steps = jnp.tril(jnp.ones((ROWS, ROWS), F32)), steps.reshape(4, ROWS, CHANNELS)
    total = jnp.einsum("ij,wjc->wic", triangle, steps, precision=lax.Precision.HIGHEST) * base
    beta = jnp.zeros((4, ROWS)) if tile.beta is None else tile.beta[...].reshape(4, ROWS)
    size, own = beta * jnp.sum(k * k, -1), jnp.sum(k * q, -1, keepdims=True)
    norm = lambda x: (
        lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + L2NORM_EPS) if l2norm else jnp.ones_like(own)
    )
    of_k, of_q = norm(k), norm(q) * scale
    own, k, q = own * of_k * of_q, k * of_k, q * of_q
    rounded = lambda x: x.astype(BF16).astype(F32)

    def level(s: Any, sums: tuple) -> tuple:
        above = total + s * RANGE
        up = jnp.exp2(jnp.where(above <= 0, above, -jnp.inf))
        y = rounded(k * jnp.exp2(jnp.where((above <= 0) & (above > -RANGE), -above, -jnp.inf)))
        return tuple(a + product(rounded(b * up), y) for a, b in zip(sums, (k, q), strict=True))

    levels = (jnp.max(-total[:, -1]) / RANGE).astype(jnp.int32) + 1
    keys, scores = lax.fori_loop(0, levels, level, (jnp.zeros((4, ROWS, ROWS)),) * 2)
    decay = jnp.exp2(total)
    x, z, written = k * decay, q * decay, k * jnp.exp2(total[:, -1:] - total)
    carry = decay[:, -1]
    if tile.starts is not None:
        starts = tile.starts[...].reshape(4, ROWS)
        same, first, last = starts[:, :, None] == starts[:, None], starts == 0, starts == starts[:, -1:]
        keys, scores = (jnp.where(same, pairs, 0.0) for pairs in (keys, scores))
        x, z = (jnp.where(first[..., None], a, 0.0) for a in (x, z))
        written, carry = jnp.where(last[..., None], written, 0.0), jnp.where(first[:, -1:], carry, 0.0)
    tile.qk[...] = jnp.stack([-x if widths.reverse else x, z], 1).astype(BF16).reshape(2 * C, -1)
    tile.g[...] = written.astype(BF16).reshape(C, CHANNELS)
    tile.carry[...] = carry
    minus = -beta[..., None] * jnp.tril(keys, -1)
    m = inverse.Parts(inverse.Interpreted())
    high = lax.optimization_barrier(minus.astype(jnp.float16))
    low = (minus - high.astype(F32)).astype(jnp.float16)
    high, _ = m.results(m.less_identity(inverse.diagonal(m, (high, low))))
    scores = (jnp.tril(scores, -1) + jnp.eye(ROWS) * own).astype(BF16)
    tile.pairs[...] = jnp.concatenate([packed(block).reshape(4, 128) for block in (high, scores)], axis=1)
    if tile.norms is not None:
        least = jnp.min(jnp.concatenate([total[:, :8], total[:, 8:] - total[:, :8]], 1), -1)
        tile.norms[...] = jnp.stack([of_k[..., 0], of_q[..., 0], least]).reshape(3, C)
    return (beta if l2norm else size).reshape(C)


def _prepare(m: Any, l2norm: bool, scale: float) -> list:
    """In two numbers, of the rows r and r + 8."""
    reverse, delta = m.widths.reverse, m.beta is not None
    norms, squares, own = m.norms(l2norm, scale)
    m.put_norms(norms)
    k_norm, q_norm = (m.by_rows(norm) for norm in norms)
    zero, most = m.number(0.0), m.number(RANGE)
    end, least = zero, [zero] * 2  # of G of the rows r + 8; of the rows r, of the sums of eight
    pairs: list = [zero] * 12
    ahead = m.sums(0)
    for step in range(CHANNELS // ROWS):
        totals, k, q = ahead, m.keys(step), m.queries(step)
        ahead = m.sums(step + 1) if step + 1 < CHANNELS // ROWS else None
        rows, late = (totals[i : i + 2] + totals[i + 4 : i + 6] for i in (0, 2))
        end = m.least([end, *late])
        if m.norm_rows is not None:
            rows = rows, [arith.subf(b, a) for a, b in zip(rows, late, strict=True)]
            least = [m.least([a, *row]) for a, row in zip(least, rows, strict=True)]
        decay = [m.exp2(t) for t in totals]
        m.put_carry(step, decay)
        grown = [m.exp2(arith.minimumf(arith.negf(t), most)) for t in totals]
        k, q = m.widened_bf16(k), m.times(m.widened_bf16(q), q_norm)
        k = m.times(k, k_norm) if l2norm else k
        z = m.in_bf16(m.times(q, decay))
        x = m.in_bf16(m.times(k, decay)) if delta else z
        grown = m.times(k, grown)
        m.put_copies(step, m.negative(x) if reverse else x, z)
        m.put_written(step, m.times(grown, m.of_last_row(decay)))
        pairs = m.pairs_and(pairs, x, z, m.in_bf16(grown))
    pairs = _again(m, m.last(m.least_of_row(end)), pairs, k_norm, q_norm)
    first, second, corner = pairs[:4], pairs[4:8], pairs[8:]
    own_pairs = lambda slot, block: m.put_own(
        slot, m.right(m.in_bf16(block)) if reverse else m.in_bf16(block)
    )
    if delta:
        beta = m.by_row(m.beta)
        lower = m.times(m.of_one_document([*first, zero, zero, *corner[:2]]), beta)
        parts = inverse.Parts(m)
        inverses = inverse.diagonal(parts, parts.rounded(m.below([arith.subf(zero, x) for x in lower])))
        own_pairs(INVERSE, m.less_identity(inverses))
    scores = m.of_one_document([*second, zero, zero, *corner[2:]])
    own_pairs(SCORES, m.with_diagonal(m.below(scores), m.by_rows(own)))
    m.part_documents()
    m.put_norms([list(map(m.least_of_row, least))], SPAN)
    sizes = [beta[0], beta[2]] if delta else [zero, zero]
    return sizes if l2norm or not delta else m.times(sizes, squares)


def _again(m: Any, end: Any, pairs: list, k_norm: list, q_norm: list) -> list:
    """The pairs, by levels where `end`, the least G, is out of range; there k exp(G_C - G), too."""
    zero, never, most = m.number(0.0), m.number(-float("inf")), m.number(RANGE)
    below = lambda a, b: arith.cmpf(arith.CmpFPredicate.OLT, a, b)
    far = below(end, m.number(-RANGE))
    levels = arith.addi(arith.fptosi(i32(), arith.mulf(end, m.number(-1 / RANGE))), integer(1))
    pairs = [arith.select(far, zero, x) for x in pairs]

    def channels(i: Any, pairs: list) -> list:
        level, step = arith.shrui(i, integer(3)), arith.andi(i, integer(7))  # of 16 channels
        base = arith.mulf(arith.sitofp(ir.F32Type.get(), level), most)
        k, q, steps = m.raw(step)
        totals = m.sums_of(m.right(steps))
        k, q = m.times(m.widened_bf16(k), k_norm), m.times(m.widened_bf16(q), q_norm)
        left = [arith.subf(last, t) for last, t in zip(m.of_last_row(totals), totals, strict=True)]
        m.put_at(m.of_steps_at(step), m.in_bf16(m.times(k, [m.exp2(t) for t in left])))
        above = [arith.addf(t, base) for t in totals]
        above = [arith.select(below(zero, t), never, t) for t in above]
        up = [m.exp2(t) for t in above]
        down = [arith.select(below(m.number(-RANGE), t), arith.negf(t), never) for t in above]
        y = m.in_bf16(m.times(k, [m.exp2(t) for t in down]))
        return m.pairs_and(pairs, m.in_bf16(m.times(k, up)), m.in_bf16(m.times(q, up)), y)

    count = arith.select(far, arith.muli(levels, integer(CHANNELS // ROWS)), integer(0))
    return list(utils.fori(count, pairs)(channels).results)


def _by_token(numbers: list) -> Any:
    layout = blocks.ROWS.to_mgpu()
    registers = np.empty(2, dtype=object)
    type_ = ir.VectorType.get((1,), ir.F32Type.get())
    registers[:] = [vector.broadcast(type_, x) for x in numbers]
    registers = registers.reshape(layout.registers_shape((C,)))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
