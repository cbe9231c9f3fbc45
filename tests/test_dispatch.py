"""How an op picks a backend: order, reasons, explicit requests, devices that are not here, self-tests."""

import logging
import subprocess
import sys
import types

import hopper_aot
import jax
import jax.numpy as jnp
import pytest

import pallas_kernels.dispatch
from pallas_kernels import H100, Device, auto_means, compiled_for, explain, linear_attention, short_conv

pytestmark = pytest.mark.every_jax
HOPPER = "pallas_kernels.linear_attention.hopper"


class Kernels(types.ModuleType):
    """In the place of the Hopper backend: refuses long calls, and answers with its own name."""

    test = None  # what the self-test finds

    def supports(self, call):
        return "T is above 4" if call.q.shape[1] > 4 else None

    def runs_on(self, device):
        return None if device.capability == "9.0" else f"capability {device.capability}"

    def self_test(self):
        if isinstance(self.test, Exception):
            raise self.test
        return self.test

    def linear_attention(self, call):
        return "kernels", None


@pytest.fixture
def kernels(monkeypatch):
    module = Kernels("hopper")
    monkeypatch.setitem(sys.modules, HOPPER, module)
    pallas_kernels.dispatch._log_once.cache_clear()
    return module


@pytest.fixture
def on_h100(monkeypatch):
    monkeypatch.setattr(pallas_kernels.dispatch, "here", lambda: H100)


SHORT = {name: jnp.zeros((1, 3, 1, 4)) for name in "qkv"}
LONG = {name: jnp.zeros((1, 5, 1, 4)) for name in "qkv"}


def test_auto_prefers_supported_kernels_on_a_gpu(kernels, on_h100, caplog):
    assert linear_attention(**SHORT)[0] == "kernels"
    assert not caplog.records
    for _ in range(2):
        assert linear_attention(**LONG)[0].shape == (1, 5, 1, 4)
    [record] = caplog.records
    assert (record.name, record.levelno) == ("pallas_kernels", logging.WARNING)
    assert record.message.startswith("linear_attention runs on xla; not hopper: T is above 4; not triton: ")


def test_auto_on_a_cpu_is_xla_and_says_so_once(kernels, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        assert jax.eval_shape(linear_attention, **SHORT)[0].shape == (1, 3, 1, 4)
    [record] = [record for record in caplog.records if record.name == "pallas_kernels"]
    assert record.levelno == logging.INFO
    assert "the platform is cpu" in record.message


@pytest.mark.parametrize("backend", ["pallas", "hopper"])
def test_kernels_by_name_run_or_explain(kernels, on_h100, backend):
    assert linear_attention(**SHORT, backend=backend)[0] == "kernels"
    with pytest.raises(ValueError, match=rf"backend = '{backend}': .* this call: hopper: T is above 4"):
        linear_attention(**LONG, backend=backend)


def test_kernels_by_name_on_a_cpu_explain(kernels):
    with pytest.raises(ValueError, match="hopper: the platform is cpu"):
        linear_attention(**SHORT, backend="pallas")


def test_interpreted_kernels_need_no_device(kernels):
    assert linear_attention(**SHORT, interpret=True)[0] == "kernels"


def test_kernels_that_cannot_be_imported_are_a_reason(monkeypatch, on_h100):
    monkeypatch.setitem(sys.modules, HOPPER, None)
    with pytest.raises(ValueError, match="hopper: it cannot be imported"):
        linear_attention(**SHORT, backend="pallas")
    assert linear_attention(**SHORT)[0].shape == (1, 3, 1, 4)


@pytest.mark.parametrize("found", ["o is off by 3e-1", RuntimeError("no such instruction")])
def test_kernels_that_fail_their_test_are_passed_over(kernels, on_h100, found):
    kernels.test = found
    assert linear_attention(**SHORT)[0].shape == (1, 3, 1, 4)
    with pytest.raises(ValueError, match=str(found)):
        linear_attention(**SHORT, backend="hopper")


def test_the_self_test_runs_outside_of_the_callers_trace(kernels, on_h100):
    seen = []

    def self_test():
        seen.append(float(jnp.sum(jnp.ones(3))))  # a tracer is no float

    kernels.self_test = self_test
    for _ in range(2):
        jax.eval_shape(lambda x: [linear_attention(x, x, x), x][1], SHORT["q"])
    assert seen == [3.0]


def test_explain_lists_each_backend_once_with_reasons(kernels):
    struct = jax.ShapeDtypeStruct
    short, long = struct((1, 3, 1, 4), jnp.float32), struct((1, 5, 1, 4), jnp.float32)

    def layer(x, n):
        for _ in range(n):
            x = linear_attention(x, x, x, backend="auto")[0]
        return short_conv(x[..., 0], jnp.ones((2, 1)), jnp.zeros(x.shape[:2], jnp.int32))

    layer = jax.jit(layer, static_argnums=1)
    for device, refusals in (
        (Device("cpu"), ["the platform is cpu"] * 2),
        (Device("gpu", "10.0"), ["capability 10.0", "T is above 4"]),
        (H100, [None, "T is above 4"]),
    ):
        for x, refusal in zip((short, long), refusals, strict=True):
            attention, conv = explain(layer, x, 3, device=device)
            assert (attention.op, conv.op, conv.backend) == ("linear_attention", "short_conv", "xla")
            assert attention.backend == ("xla" if refusal else "hopper")
            assert attention.refused[:1] == ((("hopper", refusal),) if refusal else ())
            assert attention.arrays.startswith(f"q float32{list(x.shape)}, k ")
    # What was traced to explain is not what runs: on this CPU the layer is still XLA's.
    assert layer(SHORT["q"], 3).shape == (1, 3, 1)


def test_auto_means_and_compiled_for_reach_functions_jitted_before(kernels):
    layer = jax.jit(lambda x: linear_attention(x, x, x)[0])
    assert explain(layer, SHORT["q"])[0].backend == "xla"
    with auto_means("reference"):
        assert explain(layer, SHORT["q"])[0].backend == "reference"
    with (
        auto_means("cudnn", "hopper", "xla"),
        compiled_for(H100),
    ):  # in this order; linear_attention has no cudnn
        assert explain(layer, SHORT["q"])[0].backend == "hopper"
        assert explain(layer, LONG["q"])[0].backend == "xla"
    with auto_means("cudnn"), pytest.raises(ValueError, match="must be one of"):
        explain(layer, SHORT["q"])
    with compiled_for(H100):
        assert explain(layer, SHORT["q"])[0].backend == "hopper"
    with pytest.raises(ValueError, match="must be one of"), auto_means("cuda"):
        pass


def test_no_context_is_made_after_the_first_trace():
    """It would be a new part of the key of JAX's caches: what was traced before would be traced, and its
    kernels lowered, once more."""
    code = """
import importlib, pkgutil, jax, pallas_kernels

def late(*args):
    raise AssertionError("a context is made late")

jax.make_user_context = late
for one in pkgutil.walk_packages(pallas_kernels.__path__, "pallas_kernels."):
    try:
        importlib.import_module(one.name)
    except (ImportError, AttributeError) as error:  # kernels, on a jax that has not what they need
        print(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(bool(hopper_aot.NO_KERNELS), reason=hopper_aot.NO_KERNELS)
def test_the_h100_path_of_a_kda_layer_is_known_without_a_gpu():
    bf16 = lambda *shape: jax.ShapeDtypeStruct((2, 100, *shape), jnp.bfloat16)
    q, v, beta = bf16(4, 128), bf16(8, 128), bf16(8)
    run = lambda v: explain(linear_attention, q, q, v, log_decay=bf16(8, 128), beta=beta, device=H100)
    assert [choice.backend for choice in run(v)] == ["hopper"]
    [choice] = run(bf16(8, 100))
    assert choice.backend == "xla" and "V = 100" in choice.refused[0][1]


def test_requirements_say_what_to_install():
    requirements = pytest.importorskip(
        "pallas_kernels.linear_attention.hopper.requirements", exc_type=ImportError
    )
    assert requirements.why_not("0.11.2", (3, 12)) is None
    assert requirements.why_not("0.13.0.dev20261101", (3, 13)) is None
    old = requirements.why_not("0.10.2", (3, 11))
    assert "jax is 0.10.2 on Python 3.11" in old and "install Python >= 3.12 and jax[cuda12] >= 0.11.2" in old
    assert "Python >= 3.12" not in requirements.why_not("0.11.1", (3, 12))
    assert requirements.runs_on(Device("gpu", "9.0")) is None
    assert "compute capability 8.0" in requirements.runs_on(Device("gpu", "8.0"))


@pytest.mark.skipif(not hopper_aot.NO_KERNELS, reason="this jax has kernels")
def test_an_old_jax_is_told_what_to_install():
    [choice] = explain(linear_attention, *SHORT.values(), device=H100)
    assert choice.backend == "xla" and "install Python >= 3.12 and jax[cuda12] >=" in choice.refused[0][1]


@pytest.mark.skipif(bool(hopper_aot.NO_KERNELS), reason=hopper_aot.NO_KERNELS)
def test_a_jax_that_was_not_tested_is(monkeypatch, caplog):
    from pallas_kernels.linear_attention.hopper import requirements

    caplog.set_level(logging.INFO)
    want = jnp.ones(4)
    run = lambda got: requirements.self_test("op", lambda: {"o": (got, want)})
    monkeypatch.setattr(jax, "__version__", requirements.TESTED[-1])
    assert run(0 * want) is None  # a tested version is not asked
    monkeypatch.setattr(jax, "__version__", "0.99.0")
    assert run(want * 1.001) is None
    assert "op: self-test passed on jax 0.99.0 (tested: 0.11.2" in caplog.text
    assert "wrong results: {'o': '1.0e+00'}" in run(0 * want)
    assert "wrong results" in run(want * jnp.nan)
    assert "self-test failed: ZeroDivisionError" in requirements.self_test("op", lambda: 1 / 0)


@pytest.mark.skipif(bool(hopper_aot.NO_KERNELS), reason=hopper_aot.NO_KERNELS)
def test_the_self_test_itself_interpreted(monkeypatch):
    """Its calls are supported by the kernels; one of them interpreted, the others would take minutes."""
    from pallas_kernels.linear_attention import hopper, trial
    from pallas_kernels.linear_attention.hopper import requirements

    monkeypatch.setattr(jax, "__version__", "0.99.0")
    for kind in trial.KINDS:
        assert hopper.supports(trial.small_call(kind)) is None
    results = lambda: trial.compare(hopper.linear_attention, trial.Kind("head", False), interpret=True)
    assert requirements.self_test("linear_attention", results) is None
