"""Kernels compiled side by side, as soon as the program that they are in is lowered.

XLA compiles a Mosaic kernel where it comes to its call, after its passes over the whole program, one after
the other: seconds each. A process compiles a kernel once, whichever program it is in; so a program of its
call alone, compiled in another thread, is enough for XLA to find it ready. These programs are in JAX's
compilation cache, too, if there is one: where a whole program is found there, so are its kernels.

They begin together: jaxlib compiles any number of kernels at a time, but while it compiles one, XLA's own
part of no program can begin (both set LLVM's options, which are the process's).
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxlib.mlir import ir

TARGET = "mosaic_gpu_v2"  # the custom call that jax 0.11.2 and 0.12.0.1 make of a kernel
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # said in the thread that has lowered a program

_lowered = Primitive("kernel_lowered")
_lowered.multiple_results = True
_lowered.def_impl(lambda *xs: list(xs))
_lowered.def_abstract_eval(lambda *xs: list(xs))
batching.primitive_batchers[_lowered] = lambda xs, dims: (_lowered.bind(*xs), dims)
_known: set[bytes] = set()
_waiting = threading.local()  # .programs: of the kernels of the program that this thread lowers
_threads = ThreadPoolExecutor(thread_name_prefix="kernel")


def begun(results: Any) -> Any:
    """``results`` of a kernel, as they are; where they are lowered for the GPU here, it is compiled."""
    leaves, tree = jax.tree.flatten(results)
    return jax.tree.unflatten(tree, _lowered.bind(*leaves))


def attributes(operation: Any) -> dict[str, Any]:
    """Of the call of a Mosaic kernel, by name; {} for another operation."""
    if getattr(operation, "name", "") != "stablehlo.custom_call":
        return {}
    if operation.attributes["call_target_name"].value != TARGET:
        return {}
    value = lambda one: one.value_bytes if isinstance(one, ir.StringAttr) else np.bool_(one.value)
    return {one.name: value(one.attr) for one in operation.attributes["mhlo.backend_config"]}


def alone(call: dict[str, Any], device: jax.Device | None = None) -> Any:
    """A lowered program of a ``call`` (`attributes`) for a device, or the default one; not to be run."""
    number = jax.ShapeDtypeStruct((), jnp.float32)
    where = {} if device is None else {"sharding": jax.sharding.SingleDeviceSharding(device)}
    kernel = jax.ffi.ffi_call(TARGET, number, has_side_effect=True)
    traced = jax.jit(lambda x: kernel(x, **call)).trace(jax.ShapeDtypeStruct((), jnp.float32, **where))
    return traced.lower(lowering_platforms=("cuda",))


def here(context: Any) -> bool:
    """Whether what is lowered is for the GPU here, not one that is not there (`hybridlm.ahead`)."""
    if jax.default_backend() != "gpu":
        return False
    return context.module_context.get_backend(optional=True) is jax.extend.backend.get_backend()


def _lower(context: Any, *xs: Any) -> tuple[Any, ...]:
    found = attributes(xs[0].owner) if here(context) else {}
    if found and found["kernel_hash"] not in _known:
        _known.add(found["kernel_hash"])
        programs = _waiting.__dict__.setdefault("programs", [])
        programs.append(_threads.submit(alone, found))
    return xs


# Not cacheable: the rule is called where the kernel's call is then, and not in a function of its own.
mlir.register_lowering(_lowered, _lower, cacheable=False)


def _compile(event: str, duration_secs: float, **_: Any) -> None:
    if event == LOWERED:
        for program in _waiting.__dict__.pop("programs", []):
            _threads.submit(_finish, program)  # what it raises XLA meets, too, at the call, and says


def _finish(program: Future) -> None:
    program.result().compile()


jax.monitoring.register_event_duration_secs_listener(_compile)
