"""Kernels compiled as soon as they are lowered, while the rest of their program is lowered and compiled.

XLA compiles a Mosaic kernel where it comes to its call, after its passes over the whole program, one after
the other: seconds each. A process compiles a kernel once, whichever program it is in; so a program of its
call alone, compiled in another thread, is enough for XLA to find it ready.
"""

import contextlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxlib.mlir import ir

TARGET = "mosaic_gpu_v2"  # the custom call that jax 0.11.2 and 0.12.0.1 make of a kernel

_lowered = Primitive("kernel_lowered")
_lowered.multiple_results = True
_lowered.def_impl(lambda *xs: list(xs))
_lowered.def_abstract_eval(lambda *xs: list(xs))
batching.primitive_batchers[_lowered] = lambda xs, dims: (_lowered.bind(*xs), dims)
_begun: set[bytes] = set()
_one_by_one = threading.Lock()  # in the order of their calls, near enough


def begun(results: Any) -> Any:
    """``results`` of a kernel, as they are; where they are lowered for the GPU here, it begins to compile."""
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


def _lower(context: Any, *xs: Any) -> tuple[Any, ...]:
    found = attributes(xs[0].owner) if jax.default_backend() == "gpu" else {}
    if found and found["kernel_hash"] not in _begun:
        _begun.add(found["kernel_hash"])
        threading.Thread(target=_compile, args=[found], name="kernel").start()
    return xs


# Not cacheable: the rule is called where the kernel's call is then, and not in a function of its own.
mlir.register_lowering(_lowered, _lower, cacheable=False)


def _compile(call: dict[str, Any]) -> None:
    """A process that ends waits for the kernel in work, not for the others."""
    with _one_by_one, contextlib.suppress(Exception):  # XLA meets it, too, at the call, and says so
        if threading.main_thread().is_alive():
            compile_alone(call)


def compile_alone(call: dict[str, Any], device: jax.Device | None = None) -> None:
    """Compiles a program of a ``call`` (`attributes`) for a device, or the default one; not to be run."""
    from jax._src.config import enable_compilation_cache  # a thread's own has no public door

    number = jax.ShapeDtypeStruct((), jnp.float32)
    where = {} if device is None else {"sharding": jax.sharding.SingleDeviceSharding(device)}
    kernel = jax.ffi.ffi_call(TARGET, number, has_side_effect=True)
    traced = jax.jit(lambda x: kernel(x, **call)).trace(jax.ShapeDtypeStruct((), jnp.float32, **where))
    with enable_compilation_cache(False):  # the entry of the program that it is for is enough
        traced.lower(lowering_platforms=("cuda",)).compile()
