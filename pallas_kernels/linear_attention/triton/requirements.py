"""What the Triton kernels of every op need, and how they are held against a token loop on the GPU at hand."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.agreement import disagreement
from pallas_kernels.dispatch import Device, here


def runs_on(device: Device) -> str | None:
    """None if the kernels run on ``device``, else the reason why not."""
    if device.platform != "gpu":
        return f"the platform is {device.platform}"
    if device.capability is None or float(device.capability) < 8.0:
        return f"compute capability {device.capability or 'unknown'} (NVIDIA, 8.0 or newer)"
    return None


def self_test(name: str, results: Callable[[], Mapping[str, tuple[Any, Any]]]) -> str | None:
    """Why the kernels' results are wrong here, if so: asked on every GPU, with every jax.

    results: makes (the kernels', the reference's) results by name.
    """
    return disagreement(name, f"compute capability {here().capability} with jax {jax.__version__}", results)
