"""cuDNN's fused kernel, which is causal and knows a window, but no documents.

`softmax_attention` codes documents into extra channels of q and k; `packed` hands cuDNN every document as a
sequence of its own. The first is in use: benchmarks/documents.py times both.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Device
from pallas_kernels.softmax_attention import xla
from pallas_kernels.softmax_attention.call import AttentionCall

MARGIN = 256.0  # by which scores across documents fall short of those within


def supports(call: AttentionCall) -> str | None:
    """None if `softmax_attention` computes this call, else the reason why not."""
    if call.sinks is not None or call.forgotten is not None:
        return "it has sinks" if call.forgotten is None else "it has a forget gate"
    dtypes = sorted({str(x.dtype) for x in (call.q, call.k, call.v)})
    if dtypes not in (["bfloat16"], ["float16"]):
        return f"its arrays are {', '.join(dtypes)} (bfloat16 or float16 only)"
    dim, value_dim = call.q.shape[-1], call.v.shape[-1]
    codes = 0 if call.starts is None else _extra(call)[1]
    largest = 256 if float(dispatch.here().capability or 9) >= 9 else 128
    if dim + codes > largest or value_dim > dim:
        with_codes = f" (and {codes} channels for documents)" if codes else ""
        return f"its head dims are {dim}{with_codes} and {value_dim} (at most {largest}, values no wider)"
    return None


def runs_on(device: Device) -> str | None:
    """None if cuDNN's fused kernel runs on ``device``, else the reason why not."""
    if device.platform != "gpu":
        return f"the platform is {device.platform}"
    if float(device.capability or 0) < 8:
        return f"compute capability {device.capability or 'unknown'} (8.0 or more)"
    return None


def self_test() -> str | None:
    """None: `jax.nn.dot_product_attention` is public, and tested by jax."""
    return None


def softmax_attention(call: AttentionCall, implementation: Literal["xla", "cudnn"] = "cudnn") -> jax.Array:
    """See `pallas_kernels.softmax_attention`; by `jax.nn.dot_product_attention`, without a T x T mask.

    Each document's number is written in binary, as -1 and 1, into extra channels of q and k: two tokens'
    scores gain the same constant within a document, which softmax ignores, and at least MARGIN less across
    documents, of which exp leaves exactly 0.  implementation: "xla" for tests without a GPU.
    """
    q, k, v = call.q, call.k, call.v
    if call.starts is not None:
        q, k = _coded(call, call.starts)
    o = jax.nn.dot_product_attention(
        q,
        k,
        jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - v.shape[-1]))),
        scale=call.scale,
        is_causal=True,
        local_window_size=(call.window - 1, 0) if call.window else None,
        implementation=implementation,
    )
    return o[..., : v.shape[-1]]


def _extra(call: AttentionCall) -> tuple[int, int]:
    """(bits of a document's number, channels that they take: cuDNN wants a multiple of 8 in all)."""
    bits = call.q.shape[1].bit_length()
    return bits, bits + -(call.q.shape[-1] + bits) % 8


def _coded(call: AttentionCall, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(q, k) with the document's number in extra channels."""
    bits, extra = _extra(call)
    document_BT1 = jnp.cumsum(starts, axis=1)[..., None]
    code_BTE = jnp.where(document_BT1 >> jnp.arange(bits) & 1, 1, -1)
    code_BT1E = jnp.pad(code_BTE, ((0, 0), (0, 0), (0, extra - bits)))[:, :, None]
    weight = 2.0 ** math.ceil(math.log2(MARGIN / call.scale / 2))  # a power of 2 is exact in every dtype

    def coded(x: jax.Array, weight: float) -> jax.Array:
        code = jnp.broadcast_to(weight * code_BT1E, (*x.shape[:3], extra))
        return jnp.concatenate([x, code.astype(x.dtype)], axis=-1)

    return coded(call.q, weight), coded(call.k, 1.0)


def packed(call: AttentionCall, most: int) -> jax.Array:
    """See `pallas_kernels.softmax_attention`; every document a sequence of its own (cuDNN's ragged layout).

    most: documents of a row that cuDNN is prepared for, at least 2. It keeps B * most * H * T numbers for the
        gradient. If a row has more, which only the data tell, the whole call is computed otherwise.
    """
    assert call.starts is not None
    counts_B = 1 + jnp.sum(call.starts, axis=1)
    otherwise = softmax_attention if supports(call) is None else xla.softmax_attention

    def compute(path: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return path(AttentionCall(q, k, v, call.starts, call.scale, call.window))

    ragged = functools.partial(compute, functools.partial(_ragged, most=most))
    rest = functools.partial(compute, otherwise)
    return jax.lax.cond(jnp.all(counts_B <= most), ragged, rest, call.q, call.k, call.v)


def _ragged(call: AttentionCall, most: int) -> jax.Array:
    from jax._src.cudnn import fused_attention_stablehlo as fused  # offsets have no public door

    offsets, lengths = sequences(call.starts, most)
    q, k, v = call.q, call.k, call.v
    o = fused.dot_product_attention(
        q,
        k,
        jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - v.shape[-1]))),
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=call.scale,
        mask_type=fused.MaskType.PADDING_CAUSAL,
        sliding_window_length=call.window or None,
    )
    return o[..., : v.shape[-1]]


def sequences(starts: Any, most: int) -> tuple[jax.Array, jax.Array]:
    """(where each document starts, int32 [B, most + 1]; its tokens [B, most]), -1 after a row's last one."""
    length = starts.shape[1]
    every = starts.at[:, 0].set(True)
    places = jax.vmap(lambda row: jnp.nonzero(row, size=most + 1, fill_value=-1)[0])(every).astype(jnp.int32)
    here, after = places[:, :-1], places[:, 1:]
    ends = jnp.where(after < 0, length, after)
    return places, jnp.where(here < 0, -1, ends - here)
