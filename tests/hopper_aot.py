"""Compiles kernels for an H100 on a machine without a GPU and reports what ptxas says of each."""

import contextlib
import importlib
import os
import pathlib
import re
import tempfile
from typing import NamedTuple
from unittest import mock

import jax
import pytest

try:  # why the tests of the kernels are skipped here, or ""
    importlib.import_module("pallas_kernels.linear_attention.hopper")
    NO_KERNELS = ""
except ImportError as why:
    NO_KERNELS = f"no Hopper kernels: {why}"
TARGET = pathlib.Path(__file__).parents[1] / "hybridlm" / "h100.txtpb"
# Read when jax starts its backends: without it the compiler plugin wants a CUDA driver.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


class Kernel(NamedTuple):
    """Registers a thread at launch, bytes a thread spills, constant registers that wgmma has on the left.

    A constant there is wrong on hardware (docs/kernels_channel.md, 6), so `compile_for_hopper` refuses it.
    """

    name: str
    registers: int
    spills: int
    constants: int


def on_every_jax(cases, name):
    """The names of ``cases`` to parametrise with, ``name`` marked `every_jax`."""
    assert name in cases, name
    return [pytest.param(each, marks=pytest.mark.every_jax) if each == name else each for each in cases]


def compiled(function, arguments, options=None):
    """The jitted function at ShapeDtypeStructs, compiled for one H100; skips without the compiler plugin."""
    return lowered(function, arguments, absent(), options).compile()


def absent():
    """An H100 that is not there; skips without the compiler plugin."""
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(
            "H100", platform="cuda", topology="1x1x1", target_config=TARGET.read_text()
        ).devices
    except Exception as error:
        pytest.skip(f"no CUDA compiler plugin: {str(error)[:80]}")
    return devices[0]


def lowered(function, arguments, device, options=None):
    """The jitted function at ShapeDtypeStructs, lowered for a device."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    placed = jax.tree.map(place, arguments)
    return jax.jit(function, compiler_options=options).trace(*placed).lower()


def compile_for_hopper(function, *arguments):
    """[Kernel] of the jitted function at ShapeDtypeStructs; shared memory that does not fit is an error."""
    with tempfile.TemporaryDirectory() as folder:
        before = dict(os.environ)
        os.environ.update(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_PTX="1", MOSAIC_GPU_DUMP_TO=folder)
        try:
            with unlike_others(folder):
                compiled(function, arguments)
        finally:
            os.environ.clear()
            os.environ.update(before)
        kernels = [_read(path) for path in sorted(pathlib.Path(folder).glob("*.ptxas"))]
    assert not any(kernel.constants for kernel in kernels), kernels
    return kernels


@contextlib.contextmanager
def unlike_others(mark):
    """Kernels carry a mark: what a process has compiled before is not compiled, and says nothing, again."""
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir

    from pallas_kernels.linear_attention.hopper import blocks

    def marked(name):
        @plgpu.inline_mgpu()
        def set_mark(context):
            context.module.operation.attributes["mosaic_gpu.mark"] = ir.StringAttr.get(mark)

        set_mark()

    jax.clear_caches()  # of kernels traced with another mark
    with mock.patch.object(blocks, "unnumbered", marked):
        yield


def _read(path):
    text = path.read_text()
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    constants = len(constant_operands(path.with_suffix(".ptx").read_text()))
    registers = int(re.findall(r"Used (\d+) registers", text)[0])
    return Kernel(path.stem, registers, sum(map(int, spills)), constants)


def without_lines(ptx):
    """A kernel's PTX without the lines of the source that it is of."""
    kept = (line.split("//")[0].rstrip() for line in ptx.splitlines())
    return [line for line in kept if line and not re.match(r"\s*\.(loc|file)\b", line)]


def constant_operands(ptx):
    """Left operands of wgmma in registers that were last moved from a literal, [(line, literal)]."""
    source, found = {}, []
    for number, line in enumerate(ptx.splitlines()):
        if move := re.match(r"\s*mov\.b32\s+(%r\d+), (%r\d+|\d+);", line):
            source[move[1]] = source.get(move[2], move[2])
        elif other := re.match(r"\s*[\w.]+\s+(%r\d+),", line):
            source.pop(other[1], None)
        if left := re.search(r"wgmma\.mma_async.*?\}, \{([^}]*)\}", line):
            values = (source.get(register.strip(), "%") for register in left[1].split(","))
            found += [(number, value) for value in values if not value.startswith("%")]
    return found
