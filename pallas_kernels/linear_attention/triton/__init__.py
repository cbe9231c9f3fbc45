"""The portable backend of `linear_attention`: Pallas kernels in Triton for NVIDIA GPUs since Ampere.

No decay, one decay per head or one per key channel; additive or delta. docs/kernels.md has the design.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Device
from pallas_kernels.linear_attention import xla
from pallas_kernels.linear_attention.call import Call
from pallas_kernels.linear_attention.triton.chunks import chunks
from pallas_kernels.linear_attention.triton.inputs import prepare, spec
from pallas_kernels.linear_attention.triton.scan import scan

__all__ = ["linear_attention", "runs_on", "self_test", "supports"]

DIMS = (64, 128, 256)


def supports(call: Call) -> str | None:
    """None if the kernels compute this call, else the reason why not."""
    dtypes = sorted({str(x.dtype) for x in (call.q, call.k, call.v)})
    if dtypes != ["bfloat16"]:
        return f"dtype {', '.join(dtypes)} of q, k, v (bfloat16 only)"
    if call.q.shape[3] not in DIMS or call.v.shape[3] not in DIMS:
        return f"head dims K = {call.q.shape[3]}, V = {call.v.shape[3]} (64, 128 or 256 each)"
    if 0 in call.v.shape:
        return "an empty call"
    if max(call.v.shape[0], call.v.shape[2]) > 65535:
        return "more than 65535 sequences or heads"
    return None


def runs_on(device: Device) -> str | None:
    """None if the kernels run on ``device``, else the reason why not."""
    if device.platform != "gpu":
        return f"the platform is {device.platform}"
    if device.capability is None or float(device.capability) < 8.0:
        return f"compute capability {device.capability or 'unknown'} (NVIDIA, 8.0 or newer)"
    return None


def self_test() -> str | None:
    return None


def linear_attention(call: Call) -> tuple[jax.Array, jax.Array | None]:
    o, state = _attend(call)
    return o, state if call.output_final_state else None


def _run(call: Call) -> tuple[jax.Array, jax.Array]:
    what = spec(call)
    out = scan(what, chunks(what, prepare(call)), call.initial_state, keep=False)
    return out.o[:, : call.q.shape[1]], out.final


_attend = _run
