"""XLA's options for the training step, all of them; programs beside it have none."""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from hybridlm.config import Config

# Where mesh.overlap asks for it on several GPUs. Left to itself XLA may combine the gradients of all layers
# into one or two sums at the end of the backward pass, with nothing left to compute beside them; and under a
# scan it gathers a layer's parameters no earlier than it needs them.
COMBINED = 64 << 20  # bytes of what is combined: a layer's gradients at d_model 1024 are 46 MB
OVERLAP: dict[str, Any] = {
    "xla_gpu_reduce_scatter_combine_threshold_bytes": COMBINED,
    "xla_gpu_all_reduce_combine_threshold_bytes": COMBINED,
    "xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_ON",
    "xla_gpu_pipeline_reduce_scatter": "COLLECTIVE_PIPELINING_MODE_ON",
    "xla_gpu_enable_pipelined_all_gather": True,  # jax 0.10's names of the two
    "xla_gpu_enable_pipelined_reduce_scatter": True,
}
# What train.xla_triton leaves out. Triton would take products of 8-bit numbers back into bf16.
NO_PRODUCTS: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
NORMS = "triton-softmax-rewriter"  # XLA's pass that makes them
DISABLED = "xla_disable_hlo_passes"


def options(config: Config, mesh: Mesh) -> dict[str, Any]:
    """For the step of a resolved ``config`` over ``mesh``."""
    on_gpus = mesh.devices.flat[0].platform in ("gpu", "cuda")
    allowed = config.train.xla_triton if on_gpus else "all"
    found: dict[str, Any] = {}
    if config.model.matmul == "fp8" or allowed in ("norms", "none"):
        found |= NO_PRODUCTS
    if allowed in ("products", "none"):
        found[DISABLED] = ",".join([*disabled(), NORMS])
    if config.mesh.overlap and mesh.size > 1 and on_gpus:
        found |= {name: value for name, value in OVERLAP.items() if _known(name, value)}
    return found


def disabled() -> list[str]:
    """Passes that $XLA_FLAGS leaves out, which an option in a program would bring back.

    A flag that is repeated adds up. A file that $XLA_FLAGS may name, as XLA has it, is read as well.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-"):
        flags = Path(flags).read_text()
    said = re.findall(rf"--{DISABLED}=(\S+)", flags)
    return [name for names in said for name in names.strip("'\"").split(",") if name]


@cache
def _known(option: str, value: Any) -> bool:
    """Whether this jaxlib's XLA has the option: names change."""
    try:
        jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
