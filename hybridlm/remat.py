"""What the backward pass keeps of each layer, apart from its input: the choices of `model.remat`.

Keeping costs memory, recomputing time. Under a scan what is kept is copied into stacks and out of them again,
which on a GPU costs as much as computing it (docs/step.md, 8), but for softmax attention over long rows.
"""

from collections.abc import Callable
from typing import Any

import jax

from hybridlm.layers import MLP_INNER, PASSED, STREAM
from hybridlm.scaled_matmul import SCALE
from pallas_kernels.softmax_attention import KEPT

# Primitives that are dear to compute again, with what their backward pass wants: cuDNN's attention of whole
# rows, and the kernels of recurrences. Short convolutions and element-wise recurrences only pass through
# memory once more.
ATTENTION = ("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper")
RECURRENCES = ("remat_opt",)

_names = jax.checkpoint_policies.save_only_these_names
_scales = _names(SCALE)  # numbers, each of a pass over a tensor


def _primitives(*names: str) -> Callable[..., Any]:
    return lambda primitive, *avals, **params: primitive.name in names


def _both(*policies: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **params: any(policy(*args, **params) for policy in policies)


_attention = _both(_names(KEPT, SCALE), _primitives(*ATTENTION))
_dots = _both(_attention, _names(STREAM), jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
_kernels = _both(_dots, _primitives(*RECURRENCES))

POLICIES: dict[str, Callable[..., Any] | None] = {
    "auto": None,  # before `hybridlm.fit` has chosen: nothing is differentiated
    "none": None,  # everything is kept
    "most": _both(_kernels, _names(PASSED)),  # and what is made by passing through memory once more
    "kernels": _kernels,  # and what the kernels of recurrences leave
    "dots": _dots,  # the outputs of projections, too
    "mixer": _both(_attention, _names(MLP_INNER)),  # the MLP's first products and
    "attention": _attention,  # the outputs of softmax attention, and log-sums for its backward pass
    "full": _scales,  # nothing else
}
