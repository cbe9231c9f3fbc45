"""The kernels of a program compiled while XLA is busy with the rest of it.

XLA compiles a Mosaic kernel where it comes to its call, after all its own passes, one after the other: seconds
each. A process compiles a kernel once, whichever program it is in; so a program of its call alone, compiled in
another thread, is enough for XLA to find it ready.
"""

import concurrent.futures
import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TARGET = "mosaic_gpu_v2"  # the custom call that jax 0.11.2 and 0.12.0.1 make of a kernel


@contextlib.contextmanager
def beside(lowered: jax.stages.Lowered, device: jax.Device | None = None, **lowering: Any) -> Iterator[None]:
    """Inside, the kernels of a ``lowered`` program are compiled in a thread; compile the program there.

    device: the one to compile for, or one of its kind; None for the default.  lowering: arguments of `lower`.
    An error is the program's, which meets it, too: the thread keeps it.
    """
    found = kernels(lowered)
    with concurrent.futures.ThreadPoolExecutor(1, "kernels") as pool:
        waiting = [pool.submit(_compile, one, device, lowering) for one in found]
        try:
            yield
        finally:
            for one in waiting:
                one.cancel()


def kernels(lowered: jax.stages.Lowered) -> list[dict[str, Any]]:
    """The attributes of the calls of Mosaic kernels in a program, each kernel once."""
    from jaxlib.mlir import ir

    found: dict[str, dict[str, Any]] = {}

    def look(operation: Any) -> Any:
        attributes = operation.attributes
        if operation.name == "stablehlo.custom_call" and attributes["call_target_name"].value == TARGET:
            config = attributes["mhlo.backend_config"]
            found.setdefault(str(config["kernel_hash"]), {one.name: _value(one.attr) for one in config})
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(look)
    return list(found.values())


def _value(attribute: Any) -> Any:
    return attribute.value_bytes if hasattr(attribute, "value_bytes") else np.bool_(attribute.value)


def _compile(attributes: dict[str, Any], device: jax.Device | None, lowering: dict[str, Any]) -> None:
    from jax._src.config import enable_compilation_cache  # a thread's own has no public door

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    if device is not None:
        where = jax.sharding.SingleDeviceSharding(device)
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=where)
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((), jnp.float32), has_side_effect=True)
    with enable_compilation_cache(False):  # the program's own entry is enough
        jax.jit(lambda x: call(x, **attributes)).trace(scalar).lower(**lowering).compile()
