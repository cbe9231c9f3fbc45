"""Kernels compiled side by side, as soon as the program that they are in is lowered.

XLA compiles a Mosaic kernel where it comes to its call, after its passes over the whole program, one after
the other: seconds each. A process compiles a kernel once, whichever program it is in; so a program of its
call alone, compiled in another thread, is enough for XLA to find it ready. These programs are in JAX's
compilation cache, too, if there is one: where a whole program is found there, so are its kernels.

They begin together: jaxlib compiles any number of kernels at a time, but while it compiles one, XLA's own
part of no program can begin (both set LLVM's options, which are the process's).
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jaxlib.mlir import ir

from pallas_kernels.linear_attention.call import varying

TARGET = "mosaic_gpu_v2"  # the custom call that jax 0.11.2 and 0.12.0.1 make of a kernel
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # said in the thread that has lowered a program

_kernel = Primitive("kernel")
_kernel.multiple_results = True
_known: set[bytes] = set()
# Of this thread. programs: of the kernels of the program that it lowers.  inside: it lowers one of them.
_thread = threading.local()
_threads = ThreadPoolExecutor(thread_name_prefix="kernel")
# A process that ends would wait for all that is queued: `atexit` comes after that, and only this before.
with contextlib.suppress(AttributeError):
    threading._register_atexit(_threads.shutdown, wait=False, cancel_futures=True)  # type: ignore[attr-defined]


def kernel(run: Callable[..., Any], *arrays: jax.Array) -> Any:
    """run(*arrays), the call of a kernel; where it is lowered for the GPU here, it is compiled.

    It is traced with arrays that vary along no axis of a mesh, nor do its results: what a kernel holds of one
    that does and what it makes itself have one type in its loops. One that writes into an argument, a
    reference, stays as it is: only JAX's own primitives may.
    """
    plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) if varying(x) else x for x in arrays]
    jaxpr, results = _roomy(lambda: jax.make_jaxpr(run, return_shape=True)(*plain))
    call = jaxpr_as_fun(jaxpr) if jaxpr.effects else functools.partial(_kernel.bind, jaxpr=jaxpr)
    return jax.tree.unflatten(jax.tree.structure(results), call(*arrays))


def _roomy(run: Callable[[], Any]) -> Any:
    """run(), with its frames in one piece of memory.

    CPython takes 16 KiB at a time for frames. A call that crosses the end of it, and all calls from the same
    depth, take and return memory of the system's, a third of the time in which a kernel is lowered. A frame
    for which so much is too little takes more: 256 KiB here, of which it leaves half to others.
    """
    return run()


_roomy.__code__ = _roomy.__code__.replace(co_stacksize=17_000)

# jax starts ptxas to ask its version for every number that it makes of a truth value, as each branch does.
with contextlib.suppress(ImportError, AttributeError):
    from jax._src.lib import mosaic_gpu

    _library = mosaic_gpu._mosaic_gpu_ext
    _library._get_ptxas_isa_version = functools.cache(_library._get_ptxas_isa_version)

# Half of what Pallas writes of a kernel nothing uses, or was written before: constants, indices. Each call of
# the kernel in a program carries all of it, for XLA to search and copy. "none": the rest is not rewritten.
FOLD = "builtin.module(canonicalize{enable-patterns=none max-iterations=1 region-simplify=disabled},cse)"
with contextlib.suppress(ImportError, AttributeError, ValueError):  # a jax without it writes them as ever
    from jax.experimental.mosaic.gpu import core
    from jaxlib.mlir.passmanager import PassManager

    _written = core._run_serde_pass
    with ir.Context():
        PassManager.parse(FOLD)

    def _folded(module: ir.Module, *args: Any, **options: Any) -> ir.Module:
        if getattr(_thread, "inside", False):
            PassManager.parse(FOLD, module.context).run(module.operation)
        return _written(module, *args, **options)

    core._run_serde_pass = _folded


@_kernel.def_impl
def _compute(*xs: Any, jaxpr: Any) -> Any:
    return jax.jit(jaxpr_as_fun(jaxpr))(*xs)


@_kernel.def_abstract_eval
def _shapes(*xs: Any, jaxpr: Any) -> Any:
    return jaxpr.out_avals


def _batch(xs: Any, dims: Any, *, jaxpr: Any) -> tuple[Any, list[int]]:
    results = kernel(jax.vmap(jaxpr_as_fun(jaxpr), in_axes=tuple(dims)), *xs)
    return results, [0] * len(results)


def _lower(context: Any, *xs: Any, jaxpr: Any) -> Any:
    plain = context.replace(avals_in=jaxpr.in_avals)
    _thread.inside = True
    try:
        results = _roomy(lambda: mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(plain, *xs))
    finally:
        _thread.inside = False
    found = attributes(results[0].owner) if here(context) else {}
    name = found.get("kernel_hash")
    if name and name not in _known:
        _known.add(name)
        programs = _thread.__dict__.setdefault("programs", [])
        programs.append(_threads.submit(alone, found))
    return results


batching.primitive_batchers[_kernel] = _batch
mlir.register_lowering(_kernel, _lower)


def here(context: Any) -> bool:
    """Whether what is lowered is for the GPU here, not one that is not there (`hybridlm.ahead`)."""
    if jax.default_backend() != "gpu":
        return False
    return context.module_context.get_backend(optional=True) is jax.extend.backend.get_backend()


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
    call_of = jax.ffi.ffi_call(TARGET, number, has_side_effect=True)
    traced = jax.jit(lambda x: call_of(x, **call)).trace(jax.ShapeDtypeStruct((), jnp.float32, **where))
    return traced.lower(lowering_platforms=("cuda",))


def _compile(event: str, duration_secs: float, **_: Any) -> None:
    if event == LOWERED:
        for program in _thread.__dict__.pop("programs", []):
            _threads.submit(_finish, program)  # what it raises XLA meets, too, at the call, and says


def _finish(program: Future) -> None:
    program.result().compile()


jax.monitoring.register_event_duration_secs_listener(_compile)
