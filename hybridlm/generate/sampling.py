"""How a token is drawn from logits."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybridlm.errors import ConfigError


class Sampling(NamedTuple):
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token. Applied in this order."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError("temperature", self.temperature, "must be >= 0 (0 is greedy) and finite")
        if self.top_k < 0:
            raise ConfigError("top_k", self.top_k, "must be >= 0 (0 keeps every token)")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", self.top_p, "must be in (0, 1]")


GREEDY = Sampling()


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """One token per row, int32 [B]; ``keys_B`` one PRNG key per row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits = logits_BV.astype(jnp.float32) / sampling.temperature
    if sampling.top_k:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        share = jax.nn.softmax(ordered)
        before = jnp.cumsum(share, axis=-1) - share  # mass ahead of a token
        last = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True) - 1
        logits = jnp.where(logits < jnp.take_along_axis(ordered, last, axis=-1), -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys_B, logits).astype(jnp.int32)
