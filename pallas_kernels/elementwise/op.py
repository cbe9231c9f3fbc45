"""The public op: checks its arguments, normalises them into a `Call` and hands it to a backend."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Op
from pallas_kernels.documents import document_starts
from pallas_kernels.elementwise.call import make

OP = Op("elementwise_recurrence", __package__, ("hopper", "triton", "xla"))

REAL = ("bfloat16", "float16", "float32", "float64")
DTYPES = (*REAL, "complex64", "complex128")


def elementwise_recurrence(
    x: jax.Array,
    log_decay: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    backend: str = "auto",
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(g_t) h_{t-1} + x_t for every channel, h_0 before the first token the initial state.

    HGRN (arXiv 2311.04823), RG-LRU (2402.19427) and, with a complex log_decay, diagonal state spaces (S4D,
    2206.11893); Mamba-1 (2312.00752) with its channels times states as channels.

    Args:
        x: [B, T, F], floating or complex. Any T.
        log_decay: [B, T, F], or [F] (the same for all tokens), floating or complex; natural log, real part
            <= 0, of any finite size or -inf: -120 forgets everything, 0 nothing.
        initial_state: None (zeros) or [B, F]; it belongs to the document of the first token.
        segment_ids: None or integers [B, T]; wherever neighbours differ a document starts and the state is
            reset exactly, by a selection: not even a nan passes. Ids may be reused: only changes count.
        backend: "reference" (token loop, the oracle), "xla" (associative scan, any device), "hopper",
            "triton", "pallas" (kernels) or "auto": kernels where they can, else "xla", logged once a reason.
        interpret: run the Pallas kernels in interpret mode (slow, for tests without a GPU).

    Returns:
        (h, final_state): h [B, T, F] in x's dtype (complex if log_decay is); final_state [B, F] in float32
            (float64 if x or log_decay is; complex if one of them is), in which everything is computed.

    Raises:
        ValueError: a shape, dtype or backend that is impossible, by argument name; or kernels by name for
            a call that they do not support, with the reason.
    """
    _check("x", x, DTYPES)
    if len(x.shape) != 3:
        raise ValueError(f"x.shape = {x.shape}: must be [B, T, F]")
    batch, length, features = x.shape
    _check("log_decay", log_decay, DTYPES, x.shape, (features,))
    log_decay = jnp.broadcast_to(log_decay, x.shape)
    starts = None if segment_ids is None else document_starts(segment_ids, (batch, length))
    if initial_state is not None:
        is_complex = "complex" in f"{x.dtype}{log_decay.dtype}"
        _check("initial_state", initial_state, DTYPES if is_complex else REAL, (batch, features))
    if length == 0:
        one = [jnp.zeros((batch, 1, features), array.dtype) for array in (x, log_decay)]
        call = make(one[0], one[1], None, initial_state)
        return jnp.zeros(x.shape, call.output_dtype), call.state
    call = make(x, log_decay, starts, initial_state, bool(interpret))
    return OP.compute(call, backend)


def _check(name: str, x: Any, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise ValueError(f"{name} = {x!r}: must be an array")
    if str(x.dtype) not in dtypes:
        raise ValueError(f"{name}.dtype = {x.dtype}: must be one of {', '.join(dtypes)}")
    if shapes and x.shape not in shapes:
        raise ValueError(f"{name}.shape = {x.shape}: must be {' or '.join(map(str, shapes))} to match x")
