"""The public op: softmax attention over a part of the keys, and its gradients once all parts are merged.

Where rows are cut into blocks there are two kinds of parts. Within its block a query sees the keys up to its
own. Of a block before only the document that reaches over the border is seen, all of it by all of it: the
last keys there by the first queries here. (Documents that begin inside a block see nothing outside it; they
are `softmax_attention`'s.)
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention_part.call import Merged, PartCall
from pallas_kernels.dispatch import Op

OP = Op("attention_part", __package__, ("cudnn", "xla"))


def attention_part(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: jax.Array, keys: jax.Array | None, *,
    scale: float, backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(o [B, T, H, V], log of the sum of exp(logits), float32 [B, H, T]) over the keys of a part.

    See `PartCall` for the arguments. A query that sees nothing has 0 and `call.UNSEEN`. Not differentiable:
    parts are merged by their sums, and what is differentiated is the whole. To `jax.checkpoint` it is one
    operation: policies that keep what cuDNN's whole calls return do not see those inside.
    """
    return _alone(q, k, v, queries, keys, scale, backend)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _alone(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: jax.Array, keys: jax.Array | None,
    scale: float, backend: str,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    return OP.compute(PartCall(q, k, v, queries, keys, scale), backend)


@_alone.defjvp
def _refused(*_: object) -> tuple:
    raise TypeError(
        "attention_part is not differentiable: use attention_part_gradients once parts are merged"
    )


def attention_part_gradients(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: jax.Array, keys: jax.Array | None, merged: Merged, *,
    scale: float, backend: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The part's share of dq, dk and dv, in the dtype of q, k, v; ``merged``: of all parts together.

    p = exp(logit - log_sum) needs no other part (FlashAttention, arXiv 2205.14135, appendix B.2).
    """
    return OP.compute(PartCall(q, k, v, queries, keys, scale, merged), backend)


def merge(
    o: jax.Array, log_sum: jax.Array, other_o: jax.Array, other_log_sum: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Two parts as one: (o float32 [B, T, H, V], log_sum [B, H, T])."""
    whole = jnp.logaddexp(log_sum, other_log_sum)
    share = lambda part: jnp.moveaxis(jnp.exp(part - whole), 1, 2)[..., None]
    return o * share(log_sum) + other_o * share(other_log_sum), whole
