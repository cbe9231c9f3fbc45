"""Compiles Triton kernels for GPUs that are not here, and reports what ptxas says of each."""

import os
import re
import shutil
from typing import NamedTuple

import hopper_aot
import jax
import pytest

from pallas_kernels.dispatch import Device, compiled_for

# Bytes of shared memory that a block of threads may have, by compute capability.
LIMITS = {"8.0": 166912, "8.9": 101376, "9.0": 232448, "10.0": 232448}
KINDS = {
    "8.0": "NVIDIA A100-SXM4-80GB",
    "8.9": "NVIDIA L4",
    "9.0": "NVIDIA H100 80GB HBM3",
    "10.0": "NVIDIA B200",
}
# To parametrise with: one target in every run, the others with the slow tests.
TARGETS = [pytest.param(each, marks=[pytest.mark.slow] * (each != "8.0")) for each in LIMITS]
SCRIPT = """#!/bin/sh
case "$*" in *" -o "*) {real} "$@" -v 2> "{folder}/$$.report" || {{ cat "{folder}/$$.report" >&2; exit 1; }};;
  *) exec {real} "$@";;  # XLA asks for its version, and for that of PTX
esac
"""


class Kernel(NamedTuple):
    """Registers a thread, bytes a thread spills, bytes of shared memory, threads a block."""

    registers: int
    spills: int
    shared: int
    threads: int


def compile_for(capability, function, arguments, folder):
    """{name: Kernel} of the Triton kernels of a function of ``arguments``, ShapeDtypeStructs.

    XLA calls ptxas through a script in ``folder`` that asks for its report. Shared memory over the target's
    limit is an error.
    """
    from jax.experimental import topologies

    real = shutil.which("ptxas")
    if real is None:
        pytest.skip("no ptxas")
    major, minor = capability.split(".")
    target = hopper_aot.TARGET.read_text().replace("major: 9\n", f"major: {major}\n    minor: {minor}\n")
    target = target.replace("optin: 232448", f"optin: {LIMITS[capability]}")
    try:
        options = {"platform": "cuda", "topology": "1x1x1", "target_config": target}
        [device] = topologies.get_topology_desc("H100", **options).devices
    except Exception as error:
        pytest.skip(f"no CUDA compiler plugin: {str(error)[:80]}")
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    (folder / "bin").mkdir()
    script = folder / "bin" / "ptxas"
    script.write_text(SCRIPT.format(real=real, folder=folder))
    script.chmod(0o755)
    kind = jax.sharding.AbstractDevice(device_kind=KINDS[capability], num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh), compiled_for(Device("gpu", capability)):
        asked = {"xla_dump_to": os.fspath(folder / "dump"), "xla_gpu_cuda_data_dir": os.fspath(folder)}
        asked["xla_backend_optimization_level"] = 3  # the suite's own is for programs on CPUs
        jax.jit(function).trace(*placed).lower().compile(compiler_options=asked)
    [sequence] = (folder / "dump").glob("*thunk_sequence.txt")
    launches = re.findall(r"\] (\w+) grid: .*threads: \[(\d+).*shared_memory: (\d+)", sequence.read_text())
    shared = {name: (int(size), int(threads)) for name, threads, size in launches}
    found = {}
    for report in folder.glob("*.report"):
        text = report.read_text()
        entry = re.search(r"entry function '(\w+)'", text)
        if entry and entry[1] in shared:
            spills = map(
                int, re.findall(r"(\d+) bytes spill (?:stores|loads)", text.split("properties for")[1])
            )
            [registers] = map(int, re.findall(r"Used (\d+) registers", text))
            found[entry[1]] = Kernel(registers, sum(spills), *shared[entry[1]])
    assert all(kernel.shared <= LIMITS[capability] for kernel in found.values()), found
    return found
