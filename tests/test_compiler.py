"""XLA's options for the step: what asks for them, and where."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from hybridlm import ahead, compiler, errors
from hybridlm import config as configs

SOFTMAX = "triton-softmax-rewriter"


def mesh(platform, size=1):
    return SimpleNamespace(size=size, devices=np.array([SimpleNamespace(platform=platform)] * size))


def options(where, **changed):
    return compiler.options(configs.resolve(tiny.config("unused", **changed)), where)


def test_exchanges_are_for_several_gpus():
    found = options(mesh("gpu", 2), mesh__overlap=True)
    assert found["xla_gpu_reduce_scatter_combine_threshold_bytes"] == compiler.COMBINED
    assert sum("pipeline" in name for name in found) == 2  # by one of the names that they have had
    for where, overlap in ((mesh("gpu", 2), False), (mesh("gpu", 1), True), (mesh("cpu", 2), True)):
        assert options(where, mesh__overlap=overlap) == {}


@pytest.mark.parametrize(
    ("allowed", "products", "passes"),
    [("all", True, None), ("products", True, SOFTMAX), ("norms", False, None), ("none", False, SOFTMAX)],
)
def test_what_triton_may_make(allowed, products, passes):
    found = options(mesh("gpu"), train__xla_triton=allowed)
    assert found.get("xla_gpu_enable_triton_gemm", True) == products
    assert found.get("xla_disable_hlo_passes") == passes
    assert options(mesh("cpu"), train__xla_triton=allowed) == {}
    in_8_bits = options(mesh("gpu"), train__xla_triton=allowed, model__matmul="fp8", model__dtype="bfloat16")
    assert in_8_bits == found | {"xla_gpu_enable_triton_gemm": False}


def test_passes_that_the_environment_leaves_out_stay_out(monkeypatch):
    """An option of the program would bring them back."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_disable_hlo_passes=a,b --xla_gpu_autotune_level=0")
    assert options(mesh("gpu"), train__xla_triton="none")["xla_disable_hlo_passes"] == f"a,b,{SOFTMAX}"


@pytest.mark.parametrize("flags", ["--{0}=fusion", "--{0}=fusion --{0}=x", '--{0}="fusion,x"', "FILE"])
def test_what_xla_leaves_out_stays_out_of_a_program_with_an_option(flags, tmp_path):
    """Without its pass "fusion" XLA makes another number of fusions; an option alone brings it back."""
    (tmp_path / "flags").write_text("--xla_disable_hlo_passes=fusion")
    flags = str(tmp_path / "flags") if flags == "FILE" else flags.format(compiler.DISABLED)
    code = """
import jax, jax.numpy as jnp
from hybridlm import compiler
def fusions(*names):
    options = {compiler.DISABLED: ",".join(names)} if names else {}
    step = jax.jit(lambda x: jnp.sin(jnp.exp(x) * 2) + jnp.cos(x), compiler_options=options)
    return step.lower(jnp.ones(8)).compile().as_text().count(" fusion(")
print(fusions(*compiler.disabled(), "other") == fusions() != fusions("other"))
"""
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "True\n"


def test_other_words_are_refused():
    with pytest.raises(errors.ConfigError, match=r"train.xla_triton = 'some'"):
        configs.resolve(tiny.config("unused", train__xla_triton="some"))


@pytest.mark.aot
def test_a_step_without_triton():
    """Compiled for an H100: norms and softmaxes are kernels of Triton's with "all" only."""
    try:
        ahead.absent("h100:1")
    except errors.ConfigError as error:
        pytest.skip(str(error))
    found = {}
    for allowed in ("all", "none"):
        config = tiny.config("unused", model__pattern="full", train__xla_triton=allowed, model__remat="full")
        text = ahead.compiled_step(configs.resolve(config), "h100:1")[1].run.as_text()
        found[allowed] = text.count("__triton")
    assert found["all"] > 0 and found["none"] == 0
