"""The causal depthwise short convolution in front of the recurrence: the public function and its XLA form.

Shape legend: B batch, T time, F features, W taps.
"""

from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.dispatch import Op
from pallas_kernels.short_conv.call import ConvCall

OP = Op("short_conv", __package__, ("hopper", "xla"), by_name=("triton",))
WHOLE = 256  # features: parts of multiples of it are written and read where they are


def short_conv(
    x_BTF: jax.Array,
    kernel_WF: jax.Array,
    positions_BT: jax.Array,
    history_BPF: jax.Array | None = None,
    *,
    silu: bool = False,
    widths: Sequence[int] = (),
    backend: str = "auto",
    interpret: bool = False,
) -> Any:
    """y_t = act(sum over back < W of kernel[W - 1 - back] * x[t - back]), act SiLU or nothing.

    Summed in float32. The last tap is on the token itself, and a tap counts only inside the document: where
    the token's position is at least ``back``. Source: FLA ShortConvolution.

    Args:
        x_BTF: [B, T, F], floating.  kernel_WF: [W, F], float32.
        positions_BT: integers [B, T], each token's place in its document, from 0.
        history_BPF: the P = W - 1 inputs before the first token, oldest first; None for zeros.
        silu: apply SiLU to the sum.
        widths: of parts of F that y comes in, arrays of their own, which Hopper's kernels write and whose
            gradients they read where they are; () for one array.
        backend: as in `linear_attention`; the Hopper kernels take bf16 without history.
        interpret: run the kernels in interpret mode (for tests).

    Returns:
        y [B, T, F] in x's dtype; with ``widths`` a tuple of its parts.

    Raises:
        ValueError: shapes that do not fit, by argument name; or kernels by name, or interpret, for a call
            that they do not support, with the reason.
    """
    width, features = kernel_WF.shape
    batch, length = x_BTF.shape[:2]
    for name, array, shape in (
        ("x_BTF", x_BTF, (batch, length, features)),
        ("positions_BT", positions_BT, (batch, length)),
        ("history_BPF", history_BPF, (batch, width - 1, features)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name}.shape = {array.shape}: must be {shape} to match x and the kernel")
    if history_BPF is not None:
        history_BPF = history_BPF.astype(x_BTF.dtype)
    if widths and (sum(widths) != features or min(widths) < 0):
        raise ValueError(f"widths = {tuple(widths)}: must add up to the {features} features")
    call = ConvCall(x_BTF, kernel_WF, positions_BT, history_BPF, bool(silu), bool(interpret), tuple(widths))
    ys = OP.compute(call, "pallas" if interpret and backend == "auto" else backend)
    return ys if widths else ys[0]
