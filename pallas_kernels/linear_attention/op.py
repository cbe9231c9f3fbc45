"""The public op: checks its arguments, normalises them into a `Call` and hands it to a backend."""

from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.linear_attention import reference, xla
from pallas_kernels.linear_attention.call import Call, alike, compute_dtype

DTYPES = ("bfloat16", "float16", "float32", "float64")


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    output_final_state: bool = False,
    backend: str = "auto",
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Causal linear attention with decay and either the additive or the delta-rule update.

    Per value head, with S_0 the initial state and all vectors columns::

        delta (beta given):    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T
        additive (beta None):  S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    With log_decay per channel and beta this is KDA (Kimi Linear, arXiv 2510.26692, eq. 1); with one decay per
    head Gated DeltaNet (2412.06464); without decay DeltaNet (2406.06484); additive with channel decay GLA
    (2312.06635) and HGRN-2 (2404.07904), with head decay RetNet (2307.08621).

    Args:
        q, k: [B, T, H, K], floating. Any T >= 1.
        v: [B, T, HV, V], floating, HV a multiple of H; value head h reads key head h // (HV // H).
        log_decay: None (no decay), [B, T, HV] (one per head) or [B, T, HV, K] (one per key channel); natural
            log, <= 0, of any finite size: -120 forgets everything, 0 nothing.
        beta: None or [B, T, HV], usually in [0, 2].
        initial_state: None (zeros) or [B, HV, K, V]; it belongs to the document of the first token.
        segment_ids: None or integers [B, T]; wherever neighbours differ a document starts and the state is
            reset exactly. Ids may be reused: only changes count.
        scale: a Python number; K**-0.5 when None.
        qk_l2norm: normalise q and k first, x * rsqrt(sum(x^2) + 1e-6) over K, gradients included.
        output_final_state: also return the state after the last token.
        backend: "reference" (token loop, the oracle), "xla" (chunkwise, any device), "pallas" (Hopper
            kernels) or "auto": the kernels where they support the call, else "xla", logged once per reason.
        interpret: run the Pallas kernels in interpret mode (slow, for tests without a GPU).

    Returns:
        (o, final_state): o [B, T, HV, V] in v's dtype; final_state [B, HV, K, V] in float32 (float64 if q, k
            or v is float64), or None unless output_final_state.

    Raises:
        ValueError: a shape, dtype or backend that is impossible, by argument name; or backend="pallas" for a
            call that the kernels do not support, with the reason.
    """
    call = _normalize(
        q, k, v, log_decay, beta, initial_state, segment_ids, scale, qk_l2norm, output_final_state, interpret
    )
    return _backend(call, backend).linear_attention(call)


def linear_attention_step(
    q_BHK: jax.Array,
    k_BHK: jax.Array,
    v_BHV: jax.Array,
    *,
    state: jax.Array,
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """One token of `linear_attention`, for decoding. B may be any number of leading axes, none included.

    Args:
        q_BHK, k_BHK: [B, H, K].  v_BHV: [B, HV, V].
        state: [B, HV, K, V], float32 (or float64); the computation runs in this dtype.
        log_decay: None, [B, HV] or [B, HV, K].  beta: None or [B, HV].
        scale, qk_l2norm: as in `linear_attention`.

    Returns:
        (o [B, HV, V] in v's dtype, the state after the token in its own dtype).

    Raises:
        ValueError: an impossible shape or dtype, by argument name.
    """
    *batch, heads, key_dim = _floating("q_BHK", q_BHK, 2).shape
    value_heads, value_dim = _floating("v_BHV", v_BHV, 2).shape[-2:]
    _expect("k_BHK", k_BHK, {(*batch, heads, key_dim)})
    _expect("v_BHV", v_BHV, {(*batch, value_heads, value_dim)})
    _check_heads("v_BHV", v_BHV.shape, heads, value_heads)
    _expect("state", state, {(*batch, value_heads, key_dim, value_dim)})
    if state.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"state.dtype = {state.dtype}: must be float32 or float64")
    _expect("log_decay", log_decay, {(*batch, value_heads), (*batch, value_heads, key_dim)})
    _expect("beta", beta, {(*batch, value_heads)})
    update = reference.update
    if dispatch.meaning() not in ("reference", "xla"):
        module = dispatch.kernels(
            "linear_attention.hopper.step", "linear_attention_step", lambda step: step.supports(state)
        )
        update = module.update if module else reference.update
    o, state = update(
        state, q_BHK, k_BHK, v_BHV, log_decay, beta, scale=_scale(scale, key_dim), qk_l2norm=qk_l2norm
    )
    return o.astype(v_BHV.dtype), state


def _backend(call: Call, backend: str) -> ModuleType:
    """The backend's module for this call."""
    backend = dispatch.meaning(backend)
    if backend in ("reference", "xla"):
        return reference if backend == "reference" else xla
    required = "backend = 'pallas'" if backend == "pallas" else ""
    supports = lambda hopper: hopper.supports(call)
    kernels = dispatch.kernels(
        "linear_attention.hopper", "linear_attention", supports, interpret=call.interpret, required=required
    )
    return kernels or xla


def _normalize(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    beta: jax.Array | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    scale: float | None,
    qk_l2norm: bool,
    output_final_state: bool,
    interpret: bool,
) -> Call:
    batch, length, heads, key_dim = _floating("q", q, 4, exact=True).shape
    value_heads, value_dim = _floating("v", v, 4, exact=True).shape[-2:]
    if length < 1:
        raise ValueError(f"q.shape = {q.shape}: must have T >= 1 ([B, T, H, K])")
    _expect("k", k, {(batch, length, heads, key_dim)})
    _expect("v", v, {(batch, length, value_heads, value_dim)})
    _check_heads("v", v.shape, heads, value_heads)
    _expect("log_decay", log_decay, {(batch, length, value_heads), (batch, length, value_heads, key_dim)})
    _expect("beta", beta, {(batch, length, value_heads)})
    _expect("initial_state", initial_state, {(batch, value_heads, key_dim, value_dim)})
    if initial_state is not None:
        initial_state = jnp.asarray(initial_state, compute_dtype(q, k, v))
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        if segment_ids.shape != (batch, length):
            raise ValueError(
                f"segment_ids.shape = {segment_ids.shape}: must be {(batch, length)}, [B, T] of q"
            )
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(f"segment_ids.dtype = {segment_ids.dtype}: must be an integer type")
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        segment_ids = jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    call = Call(
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        beta=beta,
        initial_state=initial_state,
        segment_ids=segment_ids,
        scale=_scale(scale, key_dim),
        qk_l2norm=bool(qk_l2norm),
        output_final_state=bool(output_final_state),
        interpret=bool(interpret),
    )
    return alike(call)


def _floating(name: str, x: jax.Array, ndim: int, exact: bool = False) -> jax.Array:
    """``x`` if it is a floating array of at least (or exactly) ``ndim`` axes."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise ValueError(f"{name} = {x!r}: must be an array")
    if str(x.dtype) not in DTYPES:
        raise ValueError(f"{name}.dtype = {x.dtype}: must be one of {', '.join(DTYPES)}")
    if len(x.shape) != ndim and (exact or len(x.shape) < ndim):
        raise ValueError(f"{name}.shape = {x.shape}: must have {'' if exact else 'at least '}{ndim} axes")
    return x


def _expect(name: str, x: jax.Array | None, shapes: set[tuple[int, ...]]) -> None:
    if x is None:
        return
    if _floating(name, x, 0).shape not in shapes:
        allowed = " or ".join(str(shape) for shape in sorted(shapes, key=len))
        raise ValueError(f"{name}.shape = {x.shape}: must be {allowed} to match q and v")


def _check_heads(name: str, shape: tuple[int, ...], heads: int, value_heads: int) -> None:
    if heads < 1 or value_heads < 1 or value_heads % heads:
        raise ValueError(f"{name}.shape = {shape}: its {value_heads} heads must be a multiple of q's {heads}")


def _scale(scale: float | None, key_dim: int) -> float:
    if scale is None:
        return key_dim**-0.5
    try:
        return float(scale)
    except (TypeError, ValueError, jax.errors.JAXTypeError):
        raise ValueError(f"scale = {scale!r}: must be a Python number (or None for K**-0.5)") from None
