"""Which backend every cell of configs/hybrid.py would run on, asked for an H100 of its calls' shapes."""

import hopper_aot
import jax
import jax.numpy as jnp
import pytest

if hopper_aot.NO_KERNELS:
    pytest.skip(hopper_aot.NO_KERNELS, allow_module_level=True)

from configs import hybrid
from hybridlm import config as configs
from hybridlm import model
from hybridlm.rows import Rows
from pallas_kernels import explain
from pallas_kernels.dispatch import H100, KERNELS

# The op that mixes tokens, where it is not linear_attention.
OPS = {"swa": "softmax_attention"}
OPS |= dict.fromkeys(("hgrn", "mamba", "rglru", "s4d"), "elementwise_recurrence")
OPS |= dict.fromkeys(("gdn2", "rwkv7"), "dplr")
# Calls that no kernel computes yet, at either size.
NOT_YET = {mixer: ["dplr runs on xla"] for mixer in ("gdn2", "rwkv7")}


def calls(size, mixer):
    """[Choice] of one row of the published length, bf16 as trained."""
    config = configs.resolve(configs.load(f"configs/hybrid.py:{size},{mixer},pure"))
    definition = model.build(config)
    tokens = jax.ShapeDtypeStruct((1, config.train.seq_len), jnp.int32)
    forward = lambda params, tokens, rows: model.logits(definition, params, tokens, rows)
    return explain(forward, model.shapes(definition), tokens, Rows(tokens, tokens), device=H100)


@pytest.mark.parametrize("mixer", hybrid.MIXERS)
@pytest.mark.parametrize("size", ["340m", pytest.param("1.3b", marks=pytest.mark.slow)])
def test_every_cell_runs_on_kernels(size, mixer):
    found = calls(size, mixer)
    assert OPS.get(mixer, "linear_attention") in {choice.op for choice in found}
    slow = {str(choice) for choice in found if choice.backend not in KERNELS}
    assert sorted(slow) == NOT_YET.get(mixer, [])


@pytest.mark.slow
def test_ratios_have_the_calls_of_the_pure_stack():
    """So the test above speaks for every cell: a ratio moves layers and the MLP's width, nothing else."""
    for mixer in hybrid.MIXERS:
        pure = hybrid.get_config(f"340m,{mixer},pure")
        for ratio in ("24:1", "1:1"):
            cell = hybrid.get_config(f"340m,{mixer},{ratio}")
            assert cell.mixers[mixer] == pure.mixers[mixer]
            assert cell.model.d_model == pure.model.d_model
