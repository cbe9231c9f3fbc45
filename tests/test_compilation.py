"""Kernels that begin to compile as they are lowered (pallas_kernels/compilation.py)."""

import functools
import re
import threading

import hopper_aot
import jax
import jax.numpy as jnp
import pytest
from test_short_conv import gradients_of_layers, structs

kernels_only = pytest.mark.skipif(bool(hopper_aot.NO_KERNELS), reason=hopper_aot.NO_KERNELS)


@kernels_only
def test_results_pass():
    """As they are: called, jitted, rematerialised, mapped where one of two is."""
    from pallas_kernels import compilation

    x, y = jnp.arange(6.0).reshape(2, 3), jnp.ones(3)
    for call in (compilation.begun, jax.jit(compilation.begun), jax.checkpoint(compilation.begun)):
        found = call({"x": x, "y": y})
        assert (found["x"] == x).all() and (found["y"] == y).all()
    found = jax.vmap(lambda x: compilation.begun((x, y)), out_axes=(0, None))(x)
    assert (found[0] == x).all() and (found[1] == y).all()


@pytest.fixture
def program(monkeypatch):
    """(lower: function -> program for an absent GPU, the calls of kernels that were begun, compile_alone)."""
    from pallas_kernels import compilation

    device, begun, real = hopper_aot.absent(), [], compilation.compile_alone
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(compilation, "compile_alone", begun.append)
    monkeypatch.setattr(compilation, "_begun", set())

    def lower(function):
        found = hopper_aot.lowered(function, structs(tokens=96, features=256), device)
        for thread in threading.enumerate():
            if thread.name == "kernel":
                thread.join()
        return found

    return lower, begun, functools.partial(real, device=device)


RUN = functools.partial(gradients_of_layers, "hopper")


@pytest.mark.aot
@kernels_only
def test_a_kernel_begins_once(program):
    """Of two programs with the same two kernels."""
    lower, begun, _ = program
    lower(RUN)
    lower(lambda *arrays: jax.tree.map(jnp.sin, RUN(*arrays)))
    assert len(begun) == len({call["kernel_hash"] for call in begun}) == 2


@pytest.mark.aot
@kernels_only
def test_a_program_finds_its_kernels_compiled(program, monkeypatch, tmp_path):
    """What the compiler dumps of each kernel comes with the kernel alone, and not again with its program."""
    lower, begun, compile_alone = program
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_HOST_LLVM", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    whole = lower(RUN)
    assert len(begun) == 2 and not list(tmp_path.glob("*.ptx"))
    for count, call in enumerate(begun, 1):
        compile_alone(call)
        assert len(list(tmp_path.glob("*.ptx"))) == count
    for host in tmp_path.glob("*.ll"):  # LLVM's vectoriser stays off what sets up a kernel
        assert re.search(r"define \w+ @short_conv.*#0", text := host.read_text())
        assert "attributes #0 = { noimplicitfloat }" in text
    for path in tmp_path.iterdir():
        path.unlink()
    whole.compile()
    assert not list(tmp_path.glob("*.ptx"))
