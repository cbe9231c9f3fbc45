"""RWKV's channel mixing, which sees the token before.

    y = W_v relu(W_k x_k)^2                       RWKV-7 (arXiv 2503.14456)
    y = sigmoid(W_r x_r) * W_v relu(W_k x_k)^2    with ``receptance``: RWKV-6 (arXiv 2404.05892)
    x_c = x + (x_before - x) * mu_c

x_before is the token before, 0 before a document's first.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import mlps
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format
from hybridlm.convert.rules import Rule, linear, same
from hybridlm.layers import Linear, param, zeros
from hybridlm.mixers import Site
from hybridlm.rwkv import constant, mix, ratios, shifted


@dataclasses.dataclass(frozen=True)
class Config(mlps.Inner):
    """Channel mixing.

    receptance: whether a sigmoid of a third projection scales what comes out (RWKV-6).
    """

    receptance: bool = False

    def state(self, d_model: int) -> int:
        return d_model


def _read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    gated = fields.values["model_type"] == "rwkv6"
    ratio = fields.get("hidden_ratio", 3.5 if gated else 4.0)
    hidden = fields.get("intermediate_size", 0) or -(-int(d_model * ratio) // 32) * 32
    return {"hidden": hidden, "receptance": gated}


def _write(config: Config, d_model: int) -> dict[str, Any]:
    return {"intermediate_size": config.hidden}


def _rules(config: Config, d_model: int) -> list[Rule]:
    value = linear("value", "value")
    if not config.receptance:
        return [same("mix_k", "x_k"), linear("key", "key"), value]
    both = (("key", "mix_k"), ("receptance", "mix_r"))
    return [
        value,
        *(r for name, mu in both for r in (linear(name, f"{name}.linear"), same(mu, f"{name}.mu"))),
    ]


class Mlp(mlps.Mlp):
    config_class = Config
    keeps = True
    public: ClassVar = {"fla_rwkv": Format(_read, _write, _rules, "ffn.")}

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        d_model, (_, down) = site.d_model, ratios(site.layer, site.num_layers)
        power = down if config.receptance else down**4
        shift = constant(lambda size: 1 - (jnp.arange(size) / size) ** power)
        mu = lambda: param(rngs, (d_model,), ("embed",), shift, decay=False)
        whole = jax.nn.initializers.orthogonal()
        self.mix_k = mu()
        self.key = Linear(d_model, config.hidden, rngs=rngs, axes=("embed", "mlp"), init=whole)
        self.value = Linear(config.hidden, d_model, rngs=rngs, axes=("mlp", "embed"), init=zeros)
        self.gated = config.receptance
        if self.gated:
            self.mix_r = mu()
            self.receptance = Linear(d_model, d_model, rngs=rngs, axes=("embed", None), init=zeros)

    def __call__(  # type: ignore[override]
        self, x_BTD: jax.Array, context: Context, cache: tuple[jax.Array, ...] | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, ...] | None]:
        """cache: the last token, [B, 1, D]."""
        last = self.init_cache(len(x_BTD), x_BTD.dtype) if cache is None else cache
        before, after = shifted(x_BTD, context.rows, last)
        y_BTD = self.value(jnp.square(jax.nn.relu(self.key(mix(x_BTD, before, self.mix_k[...])))))
        if self.gated:
            gate = self.receptance(mix(x_BTD, before, self.mix_r[...])).astype(jnp.float32)
            y_BTD = (jax.nn.sigmoid(gate) * y_BTD.astype(jnp.float32)).astype(x_BTD.dtype)
        return y_BTD, None if cache is None else after

    def step(self, x_BD: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        y_BTD, cache = self(x_BD[:, None], context.with_time(), cache)
        return y_BTD[:, 0], cache

    def init_cache(self, batch: int, dtype: Any) -> tuple[jax.Array, ...]:
        return (jnp.zeros((batch, 1, self.mix_k.shape[-1]), dtype),)
