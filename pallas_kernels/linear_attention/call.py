"""The normalised arguments of one `linear_attention` call: what every backend receives.

Shape legend: B batch, T time, H key heads, HV value heads (a multiple of H), K key dim, V value dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Arrays = TypeVar("Arrays")
Out = TypeVar("Out")
L2NORM_EPS = 1e-6  # inside the square root, as FLA and the public checkpoints have it


@dataclasses.dataclass(frozen=True)
class QKV:
    """What a token asks, is found by, and gives."""

    q: jax.Array
    k: jax.Array
    v: jax.Array

    @property
    def compute_dtype(self) -> jnp.dtype:
        """float64 if any of q, k, v is, else float32: the dtype of the state and of all accumulation."""
        return compute_dtype(self.q, self.k, self.v)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call(QKV):
    """Checked arguments; a pytree whose leaves are the arrays.

    q, k: [B, T, H, K].  v: [B, T, HV, V].  Floating, not necessarily of one dtype.
    log_decay: None, [B, T, HV] or [B, T, HV, K].  beta: None (additive update) or [B, T, HV].
    initial_state: None (zeros) or [B, HV, K, V] in `compute_dtype`; the state of the first token's document.
    segment_ids: None (one document a row) or int32 [B, T], 0 at the first token and one more at every change,
        so that equal ids mean the same document.
    scale: factor of q.  qk_l2norm: whether the backend is to normalise q and k.
    output_final_state: whether the state after the last token is wanted.  interpret: run kernels interpreted.
    axis: of the mesh, over which rows are cut: T is a piece of a row, which starts from the state that those
        before it leave; None for whole rows.
    strong: whether beta |k|^2 is above 1 at many tokens; see `linear_attention`.
    continues: with ``axis``, bool [N, B], whether each piece's first token is of the document before it.
    """

    log_decay: jax.Array | None = None
    beta: jax.Array | None = None
    initial_state: jax.Array | None = None
    segment_ids: jax.Array | None = None
    continues: jax.Array | None = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    qk_l2norm: bool = dataclasses.field(default=False, metadata={"static": True})
    output_final_state: bool = dataclasses.field(default=False, metadata={"static": True})
    interpret: bool = dataclasses.field(default=False, metadata={"static": True})
    axis: str | None = dataclasses.field(default=None, metadata={"static": True})
    strong: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def group(self) -> int:
        """Value heads per key head: value head h reads key head h // group."""
        return self.v.shape[2] // self.q.shape[2]

    @property
    def per_channel(self) -> bool:
        """Whether the log-decay is per key channel."""
        return self.log_decay is not None and self.log_decay.ndim == 4

    def starts(self) -> jax.Array | None:
        """Where a document starts that does not start its row, bool [B, T]; None for one document a row."""
        if self.segment_ids is None:
            return None
        return jnp.diff(self.segment_ids, axis=1, prepend=self.segment_ids[:, :1]) != 0

    def state(self) -> jax.Array:
        """The initial state, zeros if none was given."""
        if self.initial_state is not None:
            return self.initial_state
        batch, _, heads, value_dim = self.v.shape
        return self.zeros((batch, heads, self.q.shape[3], value_dim))

    def like(self, **gradients: jax.Array | None) -> "Call":
        """The gradients of the arguments as a backward pass returns them: in their dtypes, None for None."""

        def one(name: str, x: Any) -> Any:
            if x is None:
                return None
            given = gradients.get(name)
            return np.zeros(x.shape, jax.dtypes.float0) if given is None else given.astype(x.dtype)

        names = (*gradients, "segment_ids", "continues")
        return dataclasses.replace(self, **{name: one(name, getattr(self, name)) for name in names})

    def zeros(self, shape: tuple[int, ...]) -> jax.Array:
        """Zeros in `compute_dtype`, varying over the mesh axes of the arguments (inside `shard_map`)."""
        return jax.lax.full_like(self.v, 0, self.compute_dtype, shape)


def alike(call: Arrays) -> Arrays:
    """Inside `shard_map`, a pytree with all arrays varying over the mesh axes over which any of them varies.

    Scans and custom gradients need equal types; a replicated argument's gradient is then summed.
    """
    axes = frozenset().union(*(varying(x) for x in jax.tree.leaves(call)))
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(axes - varying(x)), to="varying"), call)


def varying(x: jax.Array) -> frozenset:
    """The mesh axes along which an array varies inside `shard_map` with check_vma."""
    return jax.typeof(x).manual_axis_type.varying


def differentiable(
    primal: Callable[[Call], Out], forward: Callable[[Call], tuple], backward: Callable[..., tuple[Call]]
) -> Callable[[Call], Out]:
    """``primal`` with a gradient of its own: under `jax.checkpoint` the first pass keeps nothing."""
    compiled, interpreted = jax.custom_vjp(primal), jax.custom_vjp(primal)
    compiled.defvjp(forward, backward, optimize_remat=True)
    interpreted.defvjp(forward, backward)  # the interpreter's effects rule that out
    return lambda call: (interpreted if call.interpret else compiled)(call)


def compute_dtype(*arrays: jax.Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32)


def l2_normalize(x: jax.Array) -> jax.Array:
    """x * rsqrt(sum(x^2) + 1e-6) over the last axis; an all-zero row stays zero and has finite gradients."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + L2NORM_EPS)
