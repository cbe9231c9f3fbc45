"""What the backward pass keeps of each layer, apart from its input: the choices of `model.remat`.

Keeping costs memory, recomputing time. Under a scan what is kept is copied into stacks and out of them again,
which on a GPU costs as much as computing it (docs/kernels.md, 8).
"""

from collections.abc import Callable
from typing import Any

import jax

from hybridlm.layers import MLP_INNER, PASSED, STREAM
from hybridlm.scaled_matmul import SCALE

# Primitives that are dear to compute again: a recurrence's kernels with what their backward pass wants, and
# cuDNN's attention. Short convolutions and element-wise recurrences only pass through memory once more.
DEAR = ("remat_opt", "dot_product_attention_fwd", "dot_product_attention_fwd_wrapper")

_scales = jax.checkpoint_policies.save_only_these_names(SCALE)  # numbers, each of a pass over a tensor
_inner = jax.checkpoint_policies.save_only_these_names(MLP_INNER, SCALE)
_dots = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(SCALE, STREAM),
)


def _kernels_saveable(primitive: Any, *avals: Any, **params: Any) -> Any:
    return primitive.name in DEAR or _dots(primitive, *avals, **params)


_most = jax.checkpoint_policies.save_from_both_policies(
    _kernels_saveable, jax.checkpoint_policies.save_only_these_names(PASSED)
)
POLICIES: dict[str, Callable[..., Any] | None] = {
    "auto": None,  # before `hybridlm.fit` has chosen: nothing is differentiated
    "none": None,  # everything is kept
    "most": _most,  # and what is made of these in a pass over memory
    "kernels": _kernels_saveable,  # outputs of projections and of mixers' kernels, and what these keep
    "dots": _dots,  # outputs of the projections
    "mixer": _inner,  # the MLP's, before its activation
    "full": _scales,  # nothing else
}
