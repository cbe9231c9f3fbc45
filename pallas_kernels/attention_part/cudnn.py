"""cuDNN's fused kernel with lengths of queries and keys; its backward pass takes the merged o and log_sum.

cuDNN's keys end where their length says; where a part's are its last they go in backwards, in which order is
nothing but a name without a causal mask.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention_part.call import UNSEEN, PartCall
from pallas_kernels.softmax_attention import cudnn as rows

runs_on, self_test = rows.runs_on, rows.self_test


def supports(call: PartCall) -> str | None:
    """None if `attention_part` computes this call, else the reason why not."""
    return rows.refuses(call.q, call.k, call.v)


def attention_part(call: PartCall) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.attention_part`."""
    from jax._src.cudnn import fused_attention_stablehlo as fused  # sums and lengths have no public door

    real, length = call.real(), call.q.shape[1]
    pad = lambda x: rows.padded(x, call.q)
    turned = (lambda x: x) if call.keys is None or call.leading else (lambda x: x[:, ::-1])
    k, v = turned(call.k), turned(pad(call.v))
    # Where nothing is seen one pair is computed, and left out below.
    some = lambda counts: jnp.maximum(counts, 1).astype(jnp.int32)
    queries, keys = some(call.queries), some(call.queries if call.keys is None else call.keys)
    none = jnp.zeros(0, call.q.dtype)
    operands = [call.q, k, v, none, queries, keys, none, none, none, none]
    mask = fused.MaskType.PADDING_CAUSAL if call.keys is None else fused.MaskType.PADDING
    options: dict[str, Any] = dict(
        scale=call.scale, seed=42, dropout_rate=0.0, variadic_args=(False, False), mask_type=mask,
        layout=fused.AttentionLayout.BTNH.value, sliding_window_length=None,
    )  # fmt: skip
    if "score_mod" in inspect.signature(fused._dot_product_attention_fwd_impl).parameters:  # from jax 0.12 on
        options["score_mod"] = None
    if call.merged is None:
        o, log_sum = fused._dot_product_attention_fwd_p_wrapper.bind(*operands, is_training=True, **options)
        o = jnp.where(real[..., None, None], o, 0)[..., : call.v.shape[-1]]
        return o, jnp.where(real[:, None], log_sum.reshape(-1, call.q.shape[2], length), UNSEEN)
    do, o, log_sum = call.merged
    do = jnp.where(real[..., None, None], do, 0).astype(call.q.dtype)
    log_sum = jnp.where(real[:, None], log_sum, -UNSEEN)  # of which exp leaves nothing
    operands += [log_sum, pad(o.astype(call.q.dtype)), pad(do)]
    dq, dk, dv = fused._dot_product_attention_bwd_p_wrapper.bind(*operands, **options)
    dq = jnp.where(real[..., None, None], dq, 0)
    index_S = jnp.arange(call.k.shape[1])
    seen = (index_S < keys[:, None]) & real[:, :1]
    dk, dv = (turned(jnp.where(seen[..., None, None], x, 0)) for x in (dk, dv))
    return dq, dk, dv[..., : call.v.shape[-1]]
