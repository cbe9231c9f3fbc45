"""cuDNN's fused kernel, which is causal and knows a window, but no documents.

Three ways to tell it of them, each exact; the data choose while the step runs:
  `fused`     every row is one document, and nothing needs to be said;
  `packed`    rows of at most `DOCUMENTS` documents: each is a sequence of its own (cuDNN's ragged layout);
  `coded`     more: each document's number, in binary, in extra channels of q and k.
docs/kernels_other.md has their times.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Device
from pallas_kernels.softmax_attention import xla
from pallas_kernels.softmax_attention.call import AttentionCall

DOCUMENTS = (
    16  # of a row: the workspace of `packed` grows with it, to 2 GiB for dq of 32 rows x heads x 64 at T 4096
)
LONG, WORKSPACE = 1 << 15, 1 << 32  # tokens of a row beyond which more bytes than that are too many: XLA
# reserves them for a branch that may never run
LARGEST = 256  # channels of a head on Hopper; 128 before
MARGIN = 256.0  # by which scores across documents fall short of those within


def supports(call: AttentionCall) -> str | None:
    """None if `softmax_attention` computes this call, else the reason why not."""
    if call.sinks is not None or call.forgotten is not None:
        return "it has sinks" if call.forgotten is None else "it has a forget gate"
    if call.sink_tokens:
        return "it has sink tokens"
    coded = 0 if call.starts is None or _hopper() else _extra(call)[1]
    return refuses(call.q, call.k, call.v, coded)


def refuses(q: jax.Array, k: jax.Array, v: jax.Array, coded: int = 0) -> str | None:
    """Why cuDNN does not take arrays of these dtypes and head dims, or None. coded: channels that q gains."""
    dtypes = sorted({str(x.dtype) for x in (q, k, v)})
    if dtypes not in (["bfloat16"], ["float16"]):
        return f"its arrays are {', '.join(dtypes)} (bfloat16 or float16 only)"
    dim, value_dim = q.shape[-1], v.shape[-1]
    largest = LARGEST if _hopper() else 128
    if dim + coded > largest or dim % 8 or value_dim > dim:
        with_codes = f" (and {coded} channels for documents)" if coded else ""
        allowed = f"at most {largest}, multiples of 8, values no wider"
        return f"its head dims are {dim}{with_codes} and {value_dim} ({allowed})"
    return None


def _hopper() -> bool:
    """Whether the device knows the ragged layout."""
    return float(dispatch.here().capability or 9) >= 9


runs_on = Device.before_ampere


def self_test() -> str | None:
    """None: `jax.nn.dot_product_attention` is public, and tested by jax."""
    return None


def softmax_attention(call: AttentionCall) -> jax.Array:
    """See `pallas_kernels.softmax_attention`; without a T x T mask."""
    if call.q.shape[1] % 2:  # of which JAX takes no gradients: a token more, that nobody sees
        one = lambda x: jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))
        starts = None if call.starts is None else one(call.starts)
        longer = AttentionCall(one(call.q), one(call.k), one(call.v), starts, call.scale, call.window)
        return softmax_attention(longer)[:, :-1]
    if call.starts is None:
        return fused(call)
    rest = coded if call.q.shape[-1] + _extra(call)[1] <= LARGEST else xla.softmax_attention
    ways: list[Callable[[AttentionCall], jax.Array]] = [fused, rest]
    counts_B = 1 + jnp.sum(call.starts, axis=1)
    chosen = jnp.any(counts_B > 1).astype(jnp.int32)
    if _hopper() and not (call.q.shape[1] > LONG and 4 * DOCUMENTS * call.q.size > WORKSPACE):
        ways.insert(1, packed)
        chosen += jnp.any(counts_B > DOCUMENTS)

    def branch(way: Callable[[AttentionCall], jax.Array]) -> Callable[..., jax.Array]:
        starts = None if way is fused else call.starts
        run = lambda q, k, v: way(AttentionCall(q, k, v, starts, call.scale, call.window))
        # What one branch keeps for the gradient all write: the last, whose results are wider, keeps nothing.
        return jax.checkpoint(run) if way is rest else run

    return jax.lax.switch(chosen, [branch(way) for way in ways], call.q, call.k, call.v)


def fused(call: AttentionCall, implementation: Literal["xla", "cudnn"] = "cudnn") -> jax.Array:
    """Rows of one document, whatever `starts` says.  implementation: "xla" for tests without a GPU."""
    o = jax.nn.dot_product_attention(
        call.q,
        call.k,
        padded(call.v, call.q),
        scale=call.scale,
        is_causal=True,
        local_window_size=(call.window - 1, 0) if call.window else None,
        implementation=implementation,
    )
    return o[..., : call.v.shape[-1]]


def coded(call: AttentionCall, implementation: Literal["xla", "cudnn"] = "cudnn") -> jax.Array:
    """Each document's number is written in binary, as -1 and 1, into extra channels of q and k: two tokens'
    scores gain the same constant within a document, which softmax ignores, and at least MARGIN less across
    documents, of which exp leaves exactly 0.
    """
    assert call.starts is not None
    bits, extra = _extra(call)
    document_BT1 = jnp.cumsum(call.starts, axis=1)[..., None]
    code_BTE = jnp.where(document_BT1 >> jnp.arange(bits) & 1, 1, -1)
    code_BT1E = jnp.pad(code_BTE, ((0, 0), (0, 0), (0, extra - bits)))[:, :, None]
    weight = 2.0 ** math.ceil(math.log2(MARGIN / call.scale / 2))  # a power of 2 is exact in every dtype

    def extended(x: jax.Array, weight: float) -> jax.Array:
        code = jnp.broadcast_to(weight * code_BT1E, (*x.shape[:3], extra))
        return jnp.concatenate([x, code.astype(x.dtype)], axis=-1)

    q, k = extended(call.q, weight), extended(call.k, 1.0)
    return fused(AttentionCall(q, k, call.v, None, call.scale, call.window), implementation)


def _extra(call: AttentionCall) -> tuple[int, int]:
    """(bits of a document's number, channels that they take: cuDNN wants a multiple of 8 in all)."""
    bits = call.q.shape[1].bit_length()
    return bits, bits + -(call.q.shape[-1] + bits) % 8


def packed(call: AttentionCall, most: int = DOCUMENTS) -> jax.Array:
    """Every document a sequence of its own, in rows of at most ``most``: others come out wrong.

    Keeps B * most * H * T numbers for the gradient.
    """
    from jax._src.cudnn import fused_attention_stablehlo  # offsets have no public door

    offsets, lengths = sequences(call.starts, most)
    o = fused_attention_stablehlo.dot_product_attention(
        call.q,
        call.k,
        padded(call.v, call.q),
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=call.scale,
        mask_type=fused_attention_stablehlo.MaskType.PADDING_CAUSAL,
        sliding_window_length=call.window or None,
    )
    return o[..., : call.v.shape[-1]]


def padded(v: jax.Array, q: jax.Array) -> jax.Array:
    """v with as many channels as q."""
    return jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - v.shape[-1])))


def sequences(starts: Any, most: int) -> tuple[jax.Array, jax.Array]:
    """(where each document starts, int32 [B, most + 1]; its tokens [B, most]), -1 after a row's last one."""
    length = starts.shape[1]
    every = starts.at[:, 0].set(True)
    places = jax.vmap(lambda row: jnp.nonzero(row, size=most + 1, fill_value=-1)[0])(every).astype(jnp.int32)
    here, after = places[:, :-1], places[:, 1:]
    ends = jnp.where(after < 0, length, after)
    return places, jnp.where(here < 0, -1, ends - here)
