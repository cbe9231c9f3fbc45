"""Parameters with logical axes, and the small layers that mixers and the model are made of.

Every parameter is an ``nnx.Param``, created in float32, with five pieces of metadata (`model.Meta`):
  axes: one logical axis name (or None) per dimension; `sharding.RULES` maps names to mesh axes.
  decay: whether weight decay applies (matrices yes; norms, biases, A_log, dt_bias no).
  cast: whether it is only ever used in the activation's dtype, so that it may be given in it
    (`model.cast_to_compute`).
  rule: what changes it after each step in place of the optimiser (`Rule`), or None.
  plain: whether it starts as `matrix`, at any width; other initialisers are taken to know their inputs.

Shape legend: B batch, T time, D model width, V vocabulary, H heads, K head dim, F features.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hybridlm import pieces
from hybridlm.rms import rms, scaled_rms
from hybridlm.rows import Rows, continued
from hybridlm.scaled_matmul import MULTIPLE, scaled_matmul
from hybridlm.sharding import constrain, parts, per_shard
from pallas_kernels import elementwise_recurrence, short_conv
from pallas_kernels.elementwise import piece as elementwise_piece

Initializer = Callable[..., jax.Array]
MLP_INNER = "mlp_inner"  # name of what model.remat = "mixer" keeps
STREAM = "stream"  # of the residual stream between a block's halves
PASSED = "passed"  # of what only passes through memory once more to be made again
LORA = ("lora_a", "lora_b")  # the factors beside a kernel
NARROW = 8  # times as long as wide: a matrix with a few outputs a head, or a router
INIT_STD = 0.02  # FLA and most public checkpoints: N(0, 0.02) for every matrix


class Rule(NamedTuple):
    """How a parameter that has no gradient changes after each step.

    record: name of what its layer records in training (`Context.record`), added up over the whole batch.
    update: (value, that sum) -> the next value.
    """

    record: str
    update: Callable[[jax.Array, jax.Array], jax.Array]


def normal(std: float = INIT_STD) -> Initializer:
    return jax.nn.initializers.normal(std)


zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
matrix = normal()


def uniform(low: float, high: float) -> Initializer:
    """U(low, high)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, low, high)


def param(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: Sequence[str | None],
    init: Initializer,
    *,
    decay: bool,
    cast: bool = False,
    rule: Rule | None = None,
) -> nnx.Param:
    """A float32 parameter of ``shape``; see the module docstring."""
    if len(axes) != len(shape):
        raise ValueError(f"axes {tuple(axes)} do not match shape {tuple(shape)}")
    value = init(rngs.params(), tuple(shape), jnp.float32)
    return nnx.Param(value, axes=tuple(axes), decay=decay, cast=cast, rule=rule, plain=init is matrix)


class Linear(nnx.Module):
    """y_..F' = x_..F @ kernel_FF' (+ bias); computes in x's dtype, or the product in 8 bits (``fp8``).

    cast: see the module docstring; False where x is float32 in a model that computes in bfloat16.
    exact: never in 8 bits: a gate or a decay.
    multiplier: of the product (Falcon-H1), 1 unless somebody sets it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        axes: tuple[str | None, str | None] = ("embed", "heads"),
        bias: bool = False,
        init: Initializer = matrix,
        cast: bool = True,
        exact: bool = False,
    ):
        self.exact, self.fp8 = exact, False
        self.kernel = param(rngs, (in_features, out_features), axes, init, decay=True, cast=cast)
        self.bias = param(rngs, (out_features,), axes[1:], zeros, decay=False, cast=cast) if bias else None
        self.rank, self.scale, self.multiplier = 0, 1.0, 1.0

    def add_factors(self, rank: int, scale: float, rngs: nnx.Rngs) -> None:
        """Beside the kernel, as in `hybridlm.lora`."""
        (fan_in, fan_out), axes = self.kernel.shape, self.kernel.axes
        cast, start = self.kernel.cast, uniform(-(fan_in**-0.5), fan_in**-0.5)
        self.rank, self.scale = rank, scale
        self.lora_a = param(rngs, (fan_in, rank), (axes[0], None), start, decay=True, cast=cast)
        self.lora_b = param(rngs, (rank, fan_out), (None, axes[1]), zeros, decay=True, cast=cast)

    def why_not_fp8(self) -> str:
        """Why the product stays in the model's dtype; "" if it need not."""
        shape, axes = self.kernel.shape, self.kernel.axes
        if self.exact or not self.kernel.cast or NARROW * min(shape) < max(shape):
            return "gates"
        if None in axes:
            return "low ranks"
        return f"not multiples of {MULTIPLE}" if any(size % MULTIPLE for size in shape) else ""

    def is_plain(self) -> bool:
        """Whether a call is the product with the kernel and nothing else."""
        return self.bias is None and self.multiplier == 1 and not (self.rank or self.fp8)

    def matrix(self, dtype: Any) -> jax.Array:
        """The kernel [in, out] with its factors in it, for those who use it otherwise than in a call."""
        kernel = self.kernel[...].astype(dtype)
        if self.rank:
            kernel += self.scale * (self.lora_a[...].astype(dtype) @ self.lora_b[...].astype(dtype))
        return kernel if self.multiplier == 1 else kernel * self.multiplier

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        y = (scaled_matmul if self.fp8 else product)(x, kernel, self.kernel.axes)
        if self.rank:
            y += self.scale * (x @ self.lora_a[...].astype(x.dtype) @ self.lora_b[...].astype(x.dtype))
        y = y if self.multiplier == 1 else y * self.multiplier
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def product(x: jax.Array, kernel: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """x @ kernel; on several devices with a gradient that says how these exchange. axes: of the kernel."""
    several = any(parts(axis) > 1 for axis in ("batch", "time", "heads"))
    return _product(x, kernel, axes) if several and x.ndim == 3 else x @ kernel


def side_by_side(x: jax.Array, linears: Sequence[Linear]) -> list[jax.Array]:
    """Each of ``linears`` of ``x``, as one product where each device has all of them, they are plain, and
    there are tokens enough to put the matrices together.

    For narrow ones: their gradients in x, each as wide as x, are then one array, not one each.
    """
    several = x.size >= x.shape[-1] ** 2 and all(one.is_plain() for one in linears)
    if not several or any(parts(one.kernel.axes[1]) > 1 for one in linears if one.kernel.axes[1]):
        return [one(x) for one in linears]
    kernels = [one.kernel[...].astype(x.dtype) for one in linears]
    x = jax.lax.optimization_barrier(x)  # else XLA joins it to a wide product of x, and cuts that by copies
    y = product(x, jnp.concatenate(kernels, axis=1), (linears[0].kernel.axes[0], None))
    return jnp.split(y, list(itertools.accumulate(kernel.shape[1] for kernel in kernels[:-1])), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x_BTD: jax.Array, kernel_DF: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return x_BTD @ kernel_DF


def _product_backward(axes: tuple, residuals: tuple, y_bar: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The kernel's gradient is added up over devices in float32, then rounded once as on one device.

    Of a kernel that is whole on the devices of "tensor" each multiplies a part: XLA adds up sums of parts
    before it exchanges them, but one whole term among those of an input's projections keeps it from that.
    """
    x_BTD, kernel_DF = residuals
    several = parts("batch") * parts("time") > 1
    wide = jnp.float32 if several else kernel_DF.dtype
    kernel_bar = jnp.einsum("btd,btf->df", x_BTD, y_bar, preferred_element_type=wide)
    if axes[1] is None and parts("heads") > 1:
        y_bar = constrain(y_bar, ("batch", "time", "heads"))
        kernel_DF = constrain(kernel_DF, (axes[0], "heads"))
    return y_bar @ kernel_DF.T, constrain(kernel_bar, axes).astype(kernel_DF.dtype)


_product.defvjp(lambda x, kernel, axes: (x @ kernel, (x, kernel)), _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The tokens' rows of the table [B, T, D] in ``dtype``. Their gradients are added up in float32.

    A frequent token has thousands of them: bfloat16 would round their sum off, and GPUs, which cannot add it
    in memory, would take turns at it.
    """
    return constrain(table_VD.astype(dtype), ("vocab", None))[tokens_BT]


def _embed_backward(dtype: jnp.dtype, residuals: tuple, x_bar: jax.Array) -> tuple[jax.Array, None]:
    table_VD, tokens_BT = residuals
    table_bar = jnp.zeros_like(table_VD).at[tokens_BT].add(x_bar.astype(table_VD.dtype))
    # Each device adds up its own tokens, where XLA would gather all of x_bar to cut it by D.
    if parts("time") > 1 or parts("batch") > parts("embed"):
        table_bar = constrain(table_bar, ("vocab", None))
    return table_bar, None


embed.defvjp(lambda table, tokens, dtype: (embed(table, tokens, dtype), (table, tokens)), _embed_backward)


class RMSNorm(nnx.Module):
    """x * rsqrt(mean(x^2) + eps) * scale over the last axis, in float32, returned in x's dtype.

    unit_offset: the factor is 1 + scale, and scale starts at 0 (Qwen3-Next, Gemma).
    groups: parts of the axis that are normed each on its own.
    scaled: whether there is a scale.
    """

    def __init__(
        self,
        features: int,
        *,
        rngs: nnx.Rngs,
        eps: float = 1e-6,
        axis: str | None = None,
        unit_offset: bool = False,
        groups: int = 1,
        scaled: bool = True,
    ):
        self.eps, self.unit_offset, self.groups = eps, unit_offset, groups
        init = zeros if unit_offset else ones
        self.scale = param(rngs, (features,), (axis,), init, decay=False) if scaled else None

    def __call__(self, x: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        """``gate``: a float32 factor, multiplied in after the norm and before rounding to x's dtype."""
        grouped = lambda a: a if self.groups == 1 else a.reshape(*a.shape[:-1], self.groups, -1)
        gate = None if gate is None else grouped(gate)
        if self.scale is None:
            y = rms(grouped(x), self.eps)
            return (y if gate is None else y * gate).reshape(x.shape).astype(x.dtype)
        scale = self.scale[...] + 1 if self.unit_offset else self.scale[...]
        # A norm of each head adds up over tokens alone, as what stands around it does, and over heads last.
        scale = jnp.broadcast_to(grouped(scale), grouped(x).shape[min(2, x.ndim - 1) :])
        return scaled_rms(grouped(x), scale, gate, self.eps).reshape(x.shape)


class LayerNorm(nnx.Module):
    """(x - mean) * rsqrt(variance + eps) * scale + bias over the last axis, in float32, returned as x is."""

    def __init__(self, features: int, *, rngs: nnx.Rngs, eps: float):
        self.eps = eps
        self.scale = param(rngs, (features,), (None,), ones, decay=False)
        self.bias = param(rngs, (features,), (None,), zeros, decay=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = rms(y - y.mean(-1, keepdims=True), self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class ShortConv(nnx.Module):
    """Causal depthwise convolution of a few taps that never reaches across a document boundary.

    kernel [width, F], tap width-1 on the current token; ``history`` is the last width-1 raw inputs
    [B, width-1, F], oldest first. Summed in float32, returned in x's dtype. Source: FLA ShortConvolution.
    bias: added to the sum.
    """

    def __init__(self, features: int, width: int, *, rngs: nnx.Rngs, bias: bool = False):
        bound = width**-0.5  # PyTorch's Conv1d default for a depthwise kernel
        self.width = width
        self.kernel = param(rngs, (width, features), ("taps", "heads"), uniform(-bound, bound), decay=True)
        init = uniform(-bound, bound)
        self.bias = param(rngs, (features,), ("heads",), init, decay=False) if bias else None

    def init_history(self, batch: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((batch, self.width - 1, self.kernel.shape[-1]), dtype)

    def __call__(
        self, x_BTF: jax.Array, rows: Rows, history: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """(y [B, T, F], the history after the last token)."""
        (y_BTF,), (after,) = convolve([self], [x_BTF], rows, None if history is None else (history,))
        return y_BTF, after

    def after(self, x_BTF: jax.Array, history: jax.Array | None) -> jax.Array:
        """The history after the last token."""
        before = self.init_history(x_BTF.shape[0], x_BTF.dtype) if history is None else history
        return jnp.concatenate([before.astype(x_BTF.dtype), x_BTF], axis=1)[:, x_BTF.shape[1] :]


class RecurrentCache(NamedTuple):
    """Decode state of a recurrent layer.

    state: any pytree, float32 [B, ...] each.
    history: raw inputs of its short convolutions, [B, width - 1, F] each; () without.
    """

    state: Any
    history: tuple[jax.Array, ...] = ()


def convolve(
    convs: Sequence[ShortConv],
    xs: Sequence[jax.Array],
    rows: Rows,
    history: tuple[jax.Array, ...] | None,
    *,
    silu: bool = False,
    joined: int = 0,
) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    """Each of ``xs`` [B, T, F] through its convolution; without convolutions only its SiLU, if ``silu``.

    history: of `RecurrentCache`; None where nothing came before. Returns (ys, the history after the last
    token).
    joined: the first so many are one to the op, whose kernels do not take narrow ones.
    """
    if not convs:
        return [jax.nn.silu(x) if silu else x for x in xs], ()
    before = history or (None,) * len(convs)
    kept = tuple(conv.after(x, past) for conv, x, past in zip(convs, xs, before, strict=True))
    ys: list[jax.Array] = []
    for i, j in itertools.pairwise(sorted({0, *range(joined, len(convs) + 1)})):
        ys += _convolved(convs[i:j], xs[i:j], rows, before[i:j], silu)
    return ys, kept


def _convolved(
    convs: Sequence[ShortConv], xs: Sequence[jax.Array], rows: Rows, history: Sequence[Any], silu: bool
) -> list[jax.Array]:
    """Each of ``xs`` through its convolution, as one to the op."""
    one = lambda parts: parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    x_BTF, kernel_WF = one(xs), one([conv.kernel[...] for conv in convs])
    past = None if history[0] is None else one(history)
    biases = [conv.bias[...] for conv in convs if conv.bias is not None]
    bias_F = one(biases) if biases else None
    token_axes, over = ("batch", "time", "heads"), pieces.over(x_BTF.shape[1])
    inside = silu and bias_F is None  # the op has no bias

    def op(x: jax.Array, kernel: jax.Array, positions: jax.Array, history: jax.Array | None) -> tuple:
        if not over:
            return (short_conv(x, kernel, positions, history, silu=inside),)
        history = pieces.before(x, len(kernel) - 1, over, history)
        first = min(len(kernel) - 1, x.shape[1])  # tokens that see history, apart: the kernels take none
        y = short_conv(x, kernel, positions, silu=inside)
        at = lambda a: a[:, :first]
        head = short_conv(at(x), kernel, at(positions), history, silu=inside, backend="xla")
        return (jax.lax.dynamic_update_slice_in_dim(y, head, 0, axis=1),)

    past_axes = None if past is None else ("batch", None, "heads")
    in_axes = token_axes, ("taps", "heads"), ("batch", "time"), past_axes
    (y_BTF,) = per_shard(op, in_axes, (token_axes,))(x_BTF, kernel_WF, rows.positions, past)
    if bias_F is not None:
        y = y_BTF.astype(jnp.float32) + bias_F
        y_BTF = (jax.nn.silu(y) if silu else y).astype(x_BTF.dtype)
    y_BTF = checkpoint_name(y_BTF, PASSED)
    cuts = list(itertools.accumulate(x.shape[-1] for x in xs[:-1]))
    return jnp.split(y_BTF, cuts, axis=-1) if cuts else [y_BTF]


def elementwise(
    x_BTF: jax.Array, log_decay_BTF: jax.Array, rows: Rows, state_BF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(log_decay_t) h_{t-1} + x_t per channel, each device on its own rows and channels.

    state_BF: float32, carried on where a row's first position is not 0. Returns (h [B, T, F] in x's dtype,
    the state after the last token). Documents never meet.
    """

    over = pieces.over(x_BTF.shape[1])

    def op(x: jax.Array, log_decay: jax.Array, segment_ids: jax.Array, state: jax.Array) -> tuple:
        if over is None:
            return elementwise_recurrence(x, log_decay, initial_state=state, segment_ids=segment_ids)
        starts = pieces.starts(segment_ids, over)
        whole = jax.checkpoint(elementwise_piece)(x, log_decay, starts)
        state, last = pieces.elementwise_states(whole, starts, state, over)
        return elementwise_recurrence(x, log_decay, initial_state=state, segment_ids=segment_ids)[0], last

    wide, state_axes = ("batch", "time", "heads"), ("batch", "heads")
    run = per_shard(op, (wide, wide, ("batch", "time"), state_axes), (wide, state_axes))
    return run(x_BTF, log_decay_BTF, rows.segment_ids, continued(state_BF, rows))


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], -1, head_dim)


def merge_heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-2], -1)


def scale_heads(value: jax.Array, factor_HK: jax.Array) -> jax.Array:
    """``value`` [..., H * K] times a factor per head and channel; [H, 1]: per head."""
    by_head = value.reshape(*value.shape[:-1], len(factor_HK), -1)
    return (by_head * factor_HK).reshape(value.shape)
