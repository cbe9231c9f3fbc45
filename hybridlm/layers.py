"""Parameters with logical axes, and the small layers that mixers and the model are made of.

Every parameter is an ``nnx.Param`` with two pieces of metadata, read by `hybridlm.sharding` and
`hybridlm.optimizer` and by nobody else:
  axes: one logical axis name (or None) per dimension; `sharding.RULES` maps names to mesh axes.
  decay: whether weight decay applies (matrices yes; norms, biases, A_log, dt_bias no).
Parameters are created in float32 and cast to the activation's dtype where they are used.

Shape legend: B batch, T time, D model width, H heads, K key dim, V value dim, F features.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm.rows import Rows

Initializer = Callable[..., jax.Array]
INIT_STD = 0.02  # FLA and most public checkpoints: N(0, 0.02) for every matrix


def normal(std: float = INIT_STD) -> Initializer:
    return jax.nn.initializers.normal(std)


zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones


def param(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str | None], init: Initializer, *, decay: bool
) -> nnx.Param:
    """A float32 parameter of ``shape`` with logical ``axes``; see the module docstring."""
    if len(axes) != len(shape):
        raise ValueError(f"axes {tuple(axes)} do not match shape {tuple(shape)}")
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32), axes=tuple(axes), decay=decay)


class Linear(nnx.Module):
    """y_..F' = x_..F @ kernel_FF' (+ bias); computes in x's dtype."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        axes: tuple[str | None, str | None] = ("embed", "heads"),
        bias: bool = False,
        init: Initializer = normal(),
    ):
        self.kernel = param(rngs, (in_features, out_features), axes, init, decay=True)
        self.bias = param(rngs, (out_features,), axes[1:], zeros, decay=False) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x * rsqrt(mean(x^2) + eps) * scale over the last axis, in float32, returned in x's dtype."""

    def __init__(self, features: int, *, rngs: nnx.Rngs, eps: float = 1e-6, axis: str | None = None):
        self.eps = eps
        self.scale = param(rngs, (features,), (axis,), ones, decay=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normalize(x, self.eps, self.scale[...])


def rms_normalize(x: jax.Array, eps: float, scale: jax.Array | None = None) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y if scale is None else y * scale).astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, features: int, hidden: int, *, rngs: nnx.Rngs):
        self.gate = Linear(features, hidden, rngs=rngs, axes=("embed", "mlp"))
        self.up = Linear(features, hidden, rngs=rngs, axes=("embed", "mlp"))
        self.down = Linear(hidden, features, rngs=rngs, axes=("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class ShortConv(nnx.Module):
    """Causal depthwise convolution of a few taps that never reaches across a document boundary.

    kernel [width, F], tap width-1 on the current token; ``history`` is the last width-1 raw inputs
    [B, width-1, F], oldest first. Source: FLA ShortConvolution (activation applied by the caller).
    """

    def __init__(self, features: int, width: int, *, rngs: nnx.Rngs, bias: bool = False):
        bound = (
            width**-0.5
        )  # PyTorch's Conv1d default for a depthwise kernel: U(-1/sqrt(width), 1/sqrt(width))
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        self.width = width
        self.kernel = param(rngs, (width, features), ("taps", "heads"), uniform, decay=True)
        self.bias = param(rngs, (features,), ("heads",), uniform, decay=False) if bias else None

    def init_history(self, batch: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((batch, self.width - 1, self.kernel.shape[-1]), dtype)

    def __call__(
        self, x_BTF: jax.Array, rows: Rows, history: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (y [B, T, F], the history after the last token)."""
        past = self.width - 1
        batch, length, features = x_BTF.shape
        if history is None:
            history = jnp.zeros((batch, past, features), x_BTF.dtype)
        padded = jnp.concatenate([history.astype(x_BTF.dtype), x_BTF], axis=1)
        kernel = self.kernel[...].astype(x_BTF.dtype)
        # A tap `back` tokens ago counts only inside the document: its position must be at least `back`.
        y = x_BTF * kernel[past]
        for back in range(1, self.width):
            inside = (rows.positions >= back)[..., None]
            y = y + jnp.where(inside, padded[:, past - back : past - back + length], 0) * kernel[past - back]
        if self.bias is not None:
            y = y + self.bias[...].astype(x_BTF.dtype)
        return y, padded[:, length:]

    def step(self, x_BF: jax.Array, rows: Rows, history: jax.Array) -> tuple[jax.Array, jax.Array]:
        one = Rows(rows.segment_ids[:, None], rows.positions[:, None])
        y, history = self(x_BF[:, None], one, history)
        return y[:, 0], history


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, rotate-half form (GPT-NeoX, FLA, Llama), angles in float32."""
    half = x_BTHK.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BT.astype(jnp.float32)[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)
