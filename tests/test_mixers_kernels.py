"""Which backends a Hopper GPU would run the kinds on, at the sizes of a 340M model in bfloat16."""

import dataclasses

import hopper_aot
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from hybridlm import config as configs
from hybridlm import linear_mixer, mixers
from hybridlm.context import Context
from hybridlm.rows import Rows, single_document
from pallas_kernels import H100, explain

MATRIX_STATE = (
    "deltanet", "kda", "mamba2", "deltaproduct", "gdp", "lightning", "mlstm",
    "featuremap", "based", "comba", "rwkv6", "loglinear", "mom", "sse",
)  # fmt: skip
STEP_ON_XLA = ("based",)  # a state of 153 features
ELEMENT_WISE = ("mamba", "rglru", "featuremap", "based", "s4d")


def backends(name: str, op: str, step: bool = False, **changed: object) -> set[str]:
    known = {
        name: mixers.config_class(kind)(kind=kind, **settings)
        for name, (kind, settings) in configs.STANDARD.items()
    }
    config = dataclasses.replace(known[name].joined(known), **changed)
    mixer = mixers.load(config.kind)
    made = nnx.eval_shape(lambda: mixer(config, mixers.Site(1024, 1, 24), rngs=nnx.Rngs(params=0)))
    graph, state = nnx.split(made)
    bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    if step:
        cache = jax.eval_shape(lambda: made.init_cache(8, 64, jnp.bfloat16))
        context = Context(Rows(jnp.ones(8, int), jnp.ones(8, int)), 1, 24)
        run = lambda state, x, cache: nnx.merge(graph, state).step(x, context, cache)[0]
        choices = explain(run, state, bf16(8, 1024), cache, device=H100)
    else:
        context = Context(single_document(8, 2048), 1, 24)
        run = lambda state, x: nnx.merge(graph, state)(x, context)[0]
        choices = explain(run, state, bf16(8, 2048, 1024), device=H100)
    return {choice.backend for choice in choices if choice.op == op}


@pytest.mark.skipif(bool(hopper_aot.NO_KERNELS), reason=hopper_aot.NO_KERNELS)
@pytest.mark.parametrize("name", MATRIX_STATE)
def test_matrix_states_are_the_kernels(name):
    assert backends(name, "linear_attention") == {"hopper"}
    step = {"xla" if name in STEP_ON_XLA else "triton"}
    assert backends(name, "linear_attention_step", step=True) == step


@pytest.mark.skipif(bool(hopper_aot.NO_KERNELS), reason=hopper_aot.NO_KERNELS)
@pytest.mark.parametrize("neg_eigval", [False, True])
def test_strong_writes_are_announced(neg_eigval, monkeypatch):
    """So that kernels that would leave most chunks to others are not asked (test_hopper_one_pass.py)."""
    attend, strong = linear_mixer.linear_attention, []

    def recorded(*args, **options):
        strong.append(options["strong"])
        return attend(*args, **options)

    monkeypatch.setattr(linear_mixer, "linear_attention", recorded)
    assert backends("kda", "linear_attention", neg_eigval=neg_eigval) == {"hopper"}
    assert set(strong) == {neg_eigval}


@pytest.mark.skipif(bool(hopper_aot.NO_KERNELS), reason=hopper_aot.NO_KERNELS)
def test_narrow_convolutions_are_the_kernel():
    assert backends("mamba2", "short_conv") == {"hopper"}


@pytest.mark.skipif(bool(hopper_aot.NO_KERNELS), reason=hopper_aot.NO_KERNELS)
@pytest.mark.parametrize("name", ELEMENT_WISE)
def test_element_wise_states_are_the_kernels(name):
    assert backends(name, "elementwise_recurrence") == {"hopper"}
