"""The portable backend of `linear_attention`: Pallas kernels in Triton for NVIDIA GPUs since Ampere.

No decay, one decay per head or one per key channel; additive or delta. The design:
docs/kernels_portable.md.
"""

import jax

from pallas_kernels import agreement
from pallas_kernels.dispatch import Device
from pallas_kernels.linear_attention import trial
from pallas_kernels.linear_attention.call import Call, differentiable
from pallas_kernels.linear_attention.trial import kind
from pallas_kernels.linear_attention.triton.additive import additive
from pallas_kernels.linear_attention.triton.backward import Gradients, gradients
from pallas_kernels.linear_attention.triton.chunks import Chunks, chunks
from pallas_kernels.linear_attention.triton.inputs import prepare, spec, unprepare
from pallas_kernels.linear_attention.triton.moves import moves
from pallas_kernels.linear_attention.triton.scan import Scanned, reverse, scan
from pallas_kernels.padding import pad_time

__all__ = ["kind", "linear_attention", "runs_on", "self_test", "supports"]

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
    if call.axis is not None:
        return "pieces of rows that are cut over devices"
    if call.v.shape[0] * call.v.shape[2] > 65535:
        return "more than 65535 sequences times heads"
    return None


runs_on = Device.before_ampere


def self_test(kind: trial.Kind) -> str | None:
    """Why a small call of the kind differs from the token loop, if so."""
    return agreement.self_test("linear_attention", lambda: trial.compare(linear_attention, kind))


Kept = tuple[Call, Chunks, Scanned]


def _primal(call: Call) -> tuple[jax.Array, jax.Array | None]:
    return _run(call, keep=False)[0]


def _forward(call: Call) -> tuple[tuple[jax.Array, jax.Array | None], Kept]:
    out, made, scanned = _run(call, keep=True)
    return out, (call, made, scanned)


def _run(call: Call, keep: bool) -> tuple[tuple[jax.Array, jax.Array | None], Chunks, Scanned]:
    what = spec(call)
    made = chunks(what, prepare(call), keep)
    out = scan(what, made, call.initial_state, keep)
    assert out.o is not None
    o = out.o[:, : call.q.shape[1]]
    return (o, out.final if call.output_final_state else None), made, out._replace(o=None, final=None)


def _backward(kept: Kept, cotangents: tuple[jax.Array, jax.Array | None]) -> tuple[Call]:
    call, made, scanned = kept
    what, inputs = spec(call), prepare(call)
    do = pad_time(cotangents[0], inputs.q.shape[1])
    back = reverse(what, made, do, cotangents[1])
    if what.delta or what.channel:
        d = gradients(what, inputs, made, moves(what, scanned, back, do), back.values)
    else:
        assert scanned.states is not None
        d = Gradients(**additive(what, inputs, do, scanned.states, back.states), v=back.values)
    return (unprepare(call, d, back.first),)


linear_attention = differentiable(_primal, _forward, _backward)
