"""Kernels that begin to compile as they are lowered (pallas_kernels/compilation.py)."""

import functools
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import hopper_aot
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from test_short_conv import gradients_of_layers, structs

from pallas_kernels import H100, compiled_for, linear_attention

kernels_only = pytest.mark.skipif(bool(hopper_aot.NO_KERNELS), reason=hopper_aot.NO_KERNELS)


@kernels_only
def test_results_pass():
    """As they are: called, jitted, under a checkpoint, mapped where one of two is, under shard_map."""
    from pallas_kernels import compilation

    x, y = jnp.arange(6.0).reshape(2, 3), jnp.ones(3)
    run = lambda x, y: {"sum": x + y, "y": y}
    kernel = functools.partial(compilation.kernel, run)
    for call in (kernel, jax.jit(kernel), jax.checkpoint(kernel)):
        found = call(x, y)
        assert (found["sum"] == x + 1).all() and (found["y"] == y).all()
    found = jax.jit(jax.vmap(kernel, in_axes=(0, None)))(x, y)
    assert (found["sum"] == x + 1).all() and found["y"].shape == (2, 3)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    parts = jax.shard_map(kernel, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert (jax.jit(parts)(x, x)["sum"] == 2 * x).all()


@kernels_only
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_kernel_writes_in_place(wrap):
    from pallas_kernels import compilation

    def run(x):
        ref = jax.new_ref(x)
        compilation.kernel(lambda ref: ref.__setitem__(..., ref[...] + 1), ref)
        return jax.freeze(ref)

    assert (wrap(run)(jnp.zeros(3)) == 1).all()


@kernels_only
def test_a_process_that_ends_waits_for_no_queued_kernel():
    script = """if True:
        import time
        from pallas_kernels import compilation
        for _ in range(1000):
            compilation._threads.submit(lambda: (time.sleep(0.01), print("compiled", flush=True)))
    """
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.count("compiled") < 1000 and not ended.stderr


@pytest.fixture
def program(monkeypatch):
    """(lower: function -> program for an absent GPU, the programs of its kernels that were begun)."""
    from pallas_kernels import compilation

    device, begun = hopper_aot.absent(), []
    monkeypatch.setattr(compilation, "here", lambda context: True)
    monkeypatch.setattr(compilation, "alone", functools.partial(compilation.alone, device=device))
    monkeypatch.setattr(compilation, "_finish", lambda program: begun.append(program.result()))
    monkeypatch.setattr(compilation, "_known", set())

    def lower(function):
        monkeypatch.setattr(compilation, "_threads", threads := ThreadPoolExecutor())
        found = hopper_aot.lowered(function, structs(tokens=96, features=256), device)
        threads.shutdown()
        return found

    return lower, begun


RUN = functools.partial(gradients_of_layers, "hopper")


@pytest.mark.aot
@kernels_only
def test_a_kernel_begins_once(program):
    """Of two programs with the same two kernels."""
    lower, begun = program
    lower(RUN)
    lower(lambda *arrays: jax.tree.map(jnp.sin, RUN(*arrays)))
    assert len(begun) == len({kernel.as_text() for kernel in begun}) == 2


@pytest.mark.aot
@kernels_only
def test_a_kernel_is_written_shorter_and_is_the_same(program, monkeypatch, tmp_path):
    """By a quarter at least, without what nothing uses and what was written before: the PTX is the same."""
    from jax.experimental.mosaic.gpu import core

    from pallas_kernels import compilation

    lower, begun = program
    with hopper_aot.unlike_others(str(tmp_path)):
        lower(RUN)
        monkeypatch.setattr(core, "_run_serde_pass", compilation._written)  # as Pallas writes kernels
        lower(lambda *arrays: RUN(*arrays))
    jax.clear_caches()  # of kernels with a mark
    assert len(begun) == 4
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    found = []
    for number, kernel in enumerate(begun):
        (folder := tmp_path / str(number)).mkdir()
        monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
        kernel.compile()
        [ptx] = folder.glob("*.ptx")
        found.append((len(kernel.as_text()), hopper_aot.without_lines(ptx.read_text())))
    for (short, ptx), (whole, same) in zip(found[:2], found[2:], strict=True):
        assert ptx == same and short < 0.75 * whole


@pytest.mark.aot
@kernels_only
def test_ptxas_is_asked_for_its_version_once():
    """Not at each branch of a kernel, of which KDA has several."""
    from jax.experimental.mosaic.gpu import fragmented_array

    device = hopper_aot.absent()
    asked = fragmented_array.mgpu_lib._mosaic_gpu_ext._get_ptxas_isa_version
    before = asked.cache_info()
    wide = jax.ShapeDtypeStruct((1, 128, 1, 128), jnp.bfloat16)
    kda = lambda x, beta: linear_attention(x, x, x, log_decay=x, beta=beta, qk_l2norm=True, backend="hopper")
    with compiled_for(H100):
        hopper_aot.lowered(kda, (wide, jax.ShapeDtypeStruct((1, 128, 1), jnp.bfloat16)), device)
    after = asked.cache_info()
    assert after.hits > before.hits and after.misses <= 1


@pytest.mark.aot
@kernels_only
def test_a_program_finds_its_kernels_compiled(program, monkeypatch, tmp_path):
    """What the compiler dumps of each kernel comes with the kernel alone, and not again with its program."""
    lower, begun = program
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_HOST_LLVM", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    whole = lower(RUN)
    assert len(begun) == 2 and not list(tmp_path.glob("*.ptx"))
    for count, kernel in enumerate(begun, 1):
        kernel.compile()
        assert len(list(tmp_path.glob("*.ptx"))) == count
    for host in tmp_path.glob("*.ll"):  # LLVM's vectoriser stays off what sets up a kernel
        assert re.search(r"define \w+ @short_conv.*#0", text := host.read_text())
        assert "attributes #0 = { noimplicitfloat }" in text
    for path in tmp_path.iterdir():
        path.unlink()
    whole.compile()
    assert not list(tmp_path.glob("*.ptx"))
