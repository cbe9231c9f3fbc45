"""The causal depthwise short convolution in front of the recurrence: the public function and its XLA form.

Shape legend: B batch, T time, F features, W taps.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Op
from pallas_kernels.linear_attention.checks import floating
from pallas_kernels.short_conv.call import ConvCall

OP = Op("short_conv", __package__, ("hopper", "triton", "xla"))


def short_conv(
    x_BTF: jax.Array,
    kernel_WF: jax.Array,
    positions_BT: jax.Array,
    history_BPF: jax.Array | None = None,
    *,
    silu: bool = False,
    backend: str = "auto",
    interpret: bool = False,
) -> jax.Array:
    """y_t = act(sum over back < W of kernel[W - 1 - back] * x[t - back]), act SiLU or nothing.

    Summed in float32. The last tap is on the token itself, and a tap counts only inside the document: where
    the token's position is at least ``back``. Source: FLA ShortConvolution.

    Args:
        x_BTF: [B, T, F], floating.  kernel_WF: [W, F], float32.
        positions_BT: integers [B, T], each token's place in its document, from 0.
        history_BPF: the P = W - 1 inputs before the first token, oldest first; None for zeros.
        silu: apply SiLU to the sum.
        backend: as in `linear_attention`; kernels take bf16 without history.
        interpret: run the kernels in interpret mode (for tests).

    Returns:
        y [B, T, F] in x's dtype.

    Raises:
        ValueError: dtypes or shapes that do not fit, by argument name; or kernels by name, or interpret, for
            a call that they do not support, with the reason.
    """
    width, features = floating("kernel_WF", kernel_WF, 2, exact=True).shape
    batch, length = floating("x_BTF", x_BTF, 3, exact=True).shape[:2]
    if width < 1:
        raise ValueError(f"kernel_WF.shape = {kernel_WF.shape}: must have W >= 1 ([W, F])")
    dtype = getattr(positions_BT, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"positions_BT.dtype = {dtype}: must be an integer type")
    for name, array, shape in (
        ("x_BTF", x_BTF, (batch, length, features)),
        ("positions_BT", positions_BT, (batch, length)),
        ("history_BPF", history_BPF, (batch, width - 1, features)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name}.shape = {array.shape}: must be {shape} to match x and the kernel")
    if history_BPF is not None:
        history_BPF = history_BPF.astype(x_BTF.dtype)
    call = ConvCall(x_BTF, kernel_WF, positions_BT, history_BPF, bool(silu), bool(interpret))
    return OP.compute(call, "pallas" if interpret and backend == "auto" else backend)
