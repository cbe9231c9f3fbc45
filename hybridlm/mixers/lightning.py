"""Lightning attention (MiniMax-01, arXiv 2501.08313; TransNormerLLM, 2307.14995): a fixed decay per head.

S_t = exp(-s_h) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t,   q, k, v = silu(W x)
y = W_o (rmsnorm(o) * sigmoid(W_g x)) with one norm over all heads; slopes s_h of head h < H in layer l < L:
    minimax         2^(-8 (h + 1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5)      few heads remember much
    transnormer     8 h / H (1 - l / L)                                     head 0 forgets nothing
TransNormerLLM has v = W x, a linear gate and a norm without scale; its first layer's LRPE is not here.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import linear_mixer
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format
from hybridlm.convert.rules import Rule, interleaved, linear, norm
from hybridlm.fields import Count, Epsilon
from hybridlm.layers import RMSNorm, merge_heads
from hybridlm.linear_mixer import Inputs, LinearMixer, OutputGate
from hybridlm.mixers import Site


@dataclasses.dataclass(frozen=True)
class Config(linear_mixer.Config):
    """Lightning attention. For TransNormerLLM's: slopes=transnormer, v_silu=False, output_gate=linear,
    norm_scale=False.

    slopes: see the module.
    v_silu: whether SiLU acts on v as it does on q and k.
    norm_scale: whether the output norm has a learned scale.
    """

    conv_size: Count = 0
    output_gate: OutputGate = "sigmoid"
    norm_eps: Epsilon = 1e-5
    slopes: Literal["minimax", "transnormer"] = "minimax"
    v_silu: bool = True
    norm_scale: bool = True


MINIMAX_NORM_EPS = 1e-6  # of the output's norm there, whatever rms_norm_eps is


def _read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    heads = fields.size("num_attention_heads", default=32)
    head_dim = fields.get("head_dim", d_model // heads)
    return {"num_heads": heads, "head_dim": head_dim, "norm_eps": MINIMAX_NORM_EPS}


def _write(config: Config, d_model: int) -> dict[str, Any]:
    return {"num_attention_heads": config.num_heads, "head_dim": config.head_dim}


def _rules(config: Config, d_model: int) -> list[Rule]:
    _, _, key, value = config.heads(d_model)
    return [
        interleaved([f"{name}_proj" for name in "qkv"], (key, key, value), "qkv_proj"),
        linear("g_proj", "output_gate"),
        norm("o_norm", "norm"),
        linear("o_proj", "out_proj"),
    ]


class Mixer(LinearMixer):
    config_class = Config
    public: ClassVar = {"minimax": Format(_read, _write, _rules, "self_attn.", "linear_attention")}
    scale = 1.0
    silu = False

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(config, site, rngs=rngs)
        self.slopes, self.v_silu, width = config.slopes, config.v_silu, self.heads.value_width
        self.o_norm = RMSNorm(width, rngs=rngs, eps=config.norm_eps, axis="heads", scaled=config.norm_scale)

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        slopes_H = slopes(self.slopes, self.heads.num, context.layer, context.num_layers)
        q, k = jax.nn.silu(q), jax.nn.silu(k)
        v = jax.nn.silu(v) if self.v_silu else v
        return Inputs(q, k, v, jnp.broadcast_to(-slopes_H, v.shape[:3]))

    def normalize(self, o_BTHV: jax.Array, gate_BTHV: jax.Array | None) -> jax.Array:
        return self.o_norm(merge_heads(o_BTHV), None if gate_BTHV is None else merge_heads(gate_BTHV))


def slopes(which: str, heads: int, layer: jax.Array | int, num_layers: int) -> jax.Array:
    """s_h of the module docstring, float32 [heads]; the layer's index may be traced."""
    head, layer = jnp.arange(heads, dtype=jnp.float32), jnp.asarray(layer, jnp.float32)
    if which == "minimax":
        return 2.0 ** (-8 * (head + 1) / heads) * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5)
    return 8 * head / heads * (1 - layer / num_layers)
