"""The causal depthwise short convolution in front of the recurrence: the public function and its XLA form.

Shape legend: B batch, T time, F features, W taps.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch


def short_conv(
    x_BTF: jax.Array,
    kernel_WF: jax.Array,
    positions_BT: jax.Array,
    history_BPF: jax.Array | None = None,
    *,
    silu: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """y_t = act(sum over back < W of kernel[W - 1 - back] * x[t - back]), act SiLU or nothing.

    Summed in float32. The last tap is on the token itself, and a tap counts only inside the document: where
    the token's position is at least ``back``. The Hopper kernels compute it where they can (a GPU, bf16, no
    history), else XLA, logged once per reason; `auto_means` holds here too. Source: FLA ShortConvolution.

    Args:
        x_BTF: [B, T, F], floating.  kernel_WF: [W, F], float32.
        positions_BT: integers [B, T], each token's place in its document, from 0.
        history_BPF: the P = W - 1 inputs before the first token, oldest first; None for zeros.
        silu: apply SiLU to the sum.  interpret: run the kernels in interpret mode (for tests).

    Returns:
        y [B, T, F] in x's dtype.

    Raises:
        ValueError: shapes that do not fit, by argument name; or interpret for a call the kernels refuse.
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
        x_BSF = jnp.concatenate([history_BPF.astype(x_BTF.dtype), x_BTF], axis=1)
        return _activate(_taps(x_BSF, kernel_WF, positions_BT), silu)
    if interpret or dispatch.meaning() not in ("reference", "xla"):
        supports = lambda kernels: kernels.supports(x_BTF, kernel_WF, interpret)
        required = "interpret = True" if interpret else ""
        kernels = dispatch.kernels("short_conv.hopper", "short_conv", supports, required=required)
        if kernels is not None:
            return kernels.short_conv(x_BTF, kernel_WF, positions_BT, silu=silu, interpret=interpret)
    # Without the checkpoint, the backward pass would keep a float32 copy of the input for every tap.
    return _activate(jax.checkpoint(_taps)(x_BTF, kernel_WF, positions_BT), silu)


def _taps(x_BSF: jax.Array, kernel_WF: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """x_BSF: the inputs of positions_BT, after S - T earlier ones."""
    earlier = x_BSF.shape[1] - positions_BT.shape[1]
    y = jnp.zeros((), jnp.float32)
    for back, kernel_F in enumerate(kernel_WF[::-1]):
        # A shift by padding needs no copy of the input.
        x_BTF = jax.lax.pad(
            x_BSF, jnp.zeros((), x_BSF.dtype), [(0, 0, 0), (back - earlier, -back, 0), (0, 0, 0)]
        )
        y += jnp.where((positions_BT >= back)[..., None], x_BTF.astype(jnp.float32), 0) * kernel_F
    return y.astype(x_BSF.dtype)


def _activate(y: jax.Array, silu: bool) -> jax.Array:
    return jax.nn.silu(y) if silu else y
