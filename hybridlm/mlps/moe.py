"""Mixture of SwiGLU experts: every token goes to its top_k experts, none is dropped.

    p = softmax(W_r x) or sigmoid(W_r x), float32    S = the top_k of p + b, among the best groups of experts
    w_e = scale * p_e / sum of p over S              (the division only with ``normalize``)
    y = sum over e in S of w_e expert_e(x)  +  [sigmoid(W_s x)] shared(x)

Softmax form: Qwen3-Next and other Qwen MoEs. Sigmoid form with a selection bias b and groups: DeepSeek-V3
(arXiv 2412.19437, section 2.1.2), Kimi Linear. Tokens are sorted by expert and go through
`jax.lax.ragged_dot`, so that no capacity bounds an expert.

Load-balancing loss of one call: balance_loss * E * sum over e of f_e P_e (Switch Transformer, arXiv
2101.03961, eq. 4), f_e the choices of expert e per token, P_e its mean share of the router's probability,
over tokens that are not padding. As in transformers, perfect balance gives balance_loss * top_k.

Shape legend: N tokens, D model width, E experts, S = top_k choices, F expert width.
"""

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import mlps
from hybridlm.context import Context
from hybridlm.convert.public_experts import FORMATS
from hybridlm.errors import ConfigError
from hybridlm.fields import Above, Count, NonNegative, Positive
from hybridlm.layers import Linear, Rule, matrix, param, zeros
from hybridlm.mixers import Site
from hybridlm.mlps import relu2, swiglu
from hybridlm.sharding import per_shard


@dataclasses.dataclass(frozen=True)
class Config(mlps.Config):
    """Mixture of experts.

    num_experts: experts to choose from.
    top_k: experts that each token goes to.
    hidden: width of each expert.
    expert: what each of them computes: swiglu, or relu2, without a gate (Nemotron 3).
    router: "softmax" (over all experts) or "sigmoid" (each by itself).
    normalize: the weights of a token's experts sum to 1 (before ``scale``).
    scale: factor on the weights (DeepSeek-V3's routed_scaling_factor).
    selection_bias: a bias per expert that takes part in the choice, not in the weight. It has no gradient:
        each step moves it by bias_rate, up for experts that got fewer tokens than the mean and down for those
        that got more (auxiliary-loss-free balancing, arXiv 2408.15664, algorithm 1).
    bias_rate: that step; 0 keeps the bias as it is.
    num_groups, top_groups: experts stand in num_groups groups of neighbours, of which the top_groups with the
        highest sum of their two best experts are eligible; 1, 1 for no groups.
    shared_hidden: width of the expert that every token goes to; 0 for none.
    shared_gate: the shared expert is scaled by sigmoid(W_s x) (Qwen).
    balance_loss: weight of the load-balancing loss, which is averaged over the stack's expert layers. It is
        of each microbatch by itself: with other train.microbatches the curve is a little different.
    """

    num_experts: Positive = 8
    top_k: Positive = 2
    hidden: Positive = 512
    expert: Literal["swiglu", "relu2"] = "swiglu"
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: Above = 1.0
    selection_bias: bool = False
    bias_rate: NonNegative = 0.001
    num_groups: Positive = 1
    top_groups: Positive = 1
    shared_hidden: Count = 0
    shared_gate: bool = False
    balance_loss: NonNegative = 0.01

    def check(self, d_model: int) -> None:
        experts, groups = self.num_experts, self.num_groups
        if groups > 1 and (experts % groups or experts < 2 * groups):
            problem = f"must split num_experts = {experts} in groups of at least 2"
            raise ConfigError("num_groups", groups, problem)
        if self.top_groups > groups:
            raise ConfigError("top_groups", self.top_groups, f"must be at most num_groups = {groups}")
        eligible = self.num_experts // self.num_groups * self.top_groups
        if self.top_k > eligible:
            raise ConfigError("top_k", self.top_k, f"must be at most {eligible}, the eligible experts")
        if self.shared_gate and not self.shared_hidden:
            raise ConfigError("shared_gate", True, "needs a shared expert", "Set shared_hidden.")

    def idle(self, d_model: int) -> int:
        matrices = 3 if self.expert == "swiglu" else 2
        return (self.num_experts - self.top_k) * matrices * d_model * self.hidden

    def explicit(self) -> "Config":
        return dataclasses.replace(self, balance_loss=0.0, bias_rate=0.0)  # of training


class Mlp(mlps.Mlp):
    """Records "loss.balance" and "load", the choices of each expert [E], over tokens that are not padding."""

    config_class = Config
    public: ClassVar = FORMATS

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        self.config, d_model = config, site.d_model
        experts, hidden = config.num_experts, config.hidden
        self.router = Linear(d_model, experts, rngs=rngs, axes=("embed", None), cast=False)
        rule = Rule("load", functools.partial(rebalance, rate=config.bias_rate))
        bias = lambda: param(rngs, (experts,), (None,), zeros, decay=False, rule=rule)
        self.selection_bias = bias() if config.selection_bias else None
        up_axes, down_axes = (None, "embed", "mlp"), (None, "mlp", "embed")
        self.gated = config.expert == "swiglu"
        if self.gated:
            self.gate = param(rngs, (experts, d_model, hidden), up_axes, matrix, decay=True, cast=True)
        self.up = param(rngs, (experts, d_model, hidden), up_axes, matrix, decay=True, cast=True)
        self.down = param(rngs, (experts, hidden, d_model), down_axes, matrix, decay=True, cast=True)
        if config.shared_hidden:
            kind: Any = swiglu if self.gated else relu2
            self.shared = kind.Mlp(kind.Config(hidden=config.shared_hidden), site, rngs=rngs)
        if config.shared_gate:
            self.shared_gate = Linear(d_model, 1, rngs=rngs, axes=("embed", None))

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        x_BTD = x if x.ndim == 3 else x[:, None]  # a decode step has no T axis
        p_BTE = self._probabilities(x_BTD)
        choice_BTS, weight_BTS = self._choose(p_BTE)
        matrices = (*([self.gate] if self.gated else []), self.up, self.down)
        weights = [w[...].astype(x.dtype) for w in matrices]
        tokens = ("batch", "time", None)
        whole = (None, None, None)  # each device has its own tokens, hence needs every expert
        run = per_shard(_experts, (*(tokens,) * 3, *(whole,) * len(weights)), (tokens,))
        y_BTD = run(x_BTD, choice_BTS, weight_BTS, *weights)[0].reshape(x.shape)
        if self.config.shared_hidden:
            shared = self.shared(x, context)
            y_BTD += jax.nn.sigmoid(self.shared_gate(x)) * shared if self.config.shared_gate else shared
        real_BT = context.rows.segment_ids.reshape(x_BTD.shape[:2]) != 0
        chosen_BTE = jax.nn.one_hot(choice_BTS, self.config.num_experts).sum(-2)
        context.record("load", jnp.sum(jnp.where(real_BT[..., None], chosen_BTE, 0), (0, 1)))
        if self.config.balance_loss:
            context.record("loss.balance", self._balance(p_BTE, chosen_BTE, real_BT))
        return y_BTD

    def _probabilities(self, x: jax.Array) -> jax.Array:
        logits = self.router(x.astype(jnp.float32))
        return jax.nn.softmax(logits) if self.config.router == "softmax" else jax.nn.sigmoid(logits)

    def _choose(self, p: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(experts int32 [..., S], weights float32 [..., S]) of each token."""
        config = self.config
        score = p if self.selection_bias is None else p + self.selection_bias[...]
        if config.num_groups > 1:
            grouped = score.reshape(*score.shape[:-1], config.num_groups, -1)
            best_two = jax.lax.top_k(grouped, 2)[0].sum(-1)
            best = jax.lax.top_k(best_two, config.top_groups)[1]
            eligible = jax.nn.one_hot(best, config.num_groups).sum(-2)
            score = jnp.where(eligible[..., None] > 0, grouped, -jnp.inf).reshape(score.shape)
        choice = jax.lax.top_k(score, config.top_k)[1]
        weight = jnp.take_along_axis(p, choice, axis=-1)
        if config.normalize:
            weight /= weight.sum(-1, keepdims=True) + 1e-20
        return choice, weight * config.scale

    def _balance(self, p_BTE: jax.Array, chosen: jax.Array, real_BT: jax.Array) -> jax.Array:
        share = p_BTE / p_BTE.sum(-1, keepdims=True)
        count = jnp.maximum(real_BT.sum(), 1)
        mean = lambda per_token: jnp.sum(jnp.where(real_BT[..., None], per_token, 0), (0, 1)) / count
        return self.config.balance_loss * self.config.num_experts * jnp.sum(mean(chosen) * mean(share))


def _experts(
    x_BTD: jax.Array, choice_BTS: jax.Array, weight_BTS: jax.Array, *kernels: jax.Array
) -> tuple[jax.Array]:
    """sum over s of weight_s expert_{choice_s}(x). Gathers are permutations: their gradients are, too."""
    *gate, up_EDF, down_EFD = kernels
    top_k = choice_BTS.shape[-1]
    flat = choice_BTS.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    back = jnp.argsort(order)
    sizes = jnp.bincount(flat, length=up_EDF.shape[0]).astype(jnp.int32)
    permute = lambda x, index: x.at[index].get(unique_indices=True, mode="promise_in_bounds")
    x = permute(jnp.repeat(x_BTD.reshape(-1, x_BTD.shape[-1]), top_k, axis=0), order)
    inner = [jax.lax.ragged_dot(x, kernel, sizes) for kernel in (*gate, up_EDF)]
    hidden = jax.nn.silu(inner[0]) * inner[1] if gate else jnp.square(jax.nn.relu(inner[0]))
    y = permute(jax.lax.ragged_dot(hidden, down_EFD, sizes), back)
    y_BTSD = y.reshape(*choice_BTS.shape, -1)
    return (jnp.einsum("btsd,bts->btd", y_BTSD, weight_BTS.astype(y.dtype)),)


def rebalance(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
    """The selection bias after a step in which expert e was chosen ``load_E`` times."""
    return bias_E + rate * jnp.sign(jnp.mean(load_E) - load_E)
