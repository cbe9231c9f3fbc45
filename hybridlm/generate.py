"""Generation: chunked prefill of left-padded prompts, then one compiled loop of single-token steps.

The cache is of fixed size: recurrent states, and a preallocated KV cache for softmax attention. A row's
samples depend on the seed, the row's index and the step only, not on the rest of the batch.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import model as lm
from hybridlm.errors import ConfigError
from hybridlm.rows import Rows

LENGTH_BUCKET = 64  # prompts and budgets are rounded up to it, so that few programs are compiled


class Sampling(NamedTuple):
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token. Applied in this order."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        if self.temperature < 0:
            raise ConfigError("temperature", self.temperature, "must be >= 0 (0 is greedy)")
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
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(
            ordered
        )  # mass ahead of a token
        last = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True) - 1
        logits = jnp.where(logits < jnp.take_along_axis(ordered, last, axis=-1), -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys_B, logits).astype(jnp.int32)


def left_pad(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, Rows]:
    """Tokens [B, length] with the prompts at the right end, and their Rows: padding is segment 0."""
    tokens = np.zeros((len(prompts), length), np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        pad = length - len(prompt)
        tokens[row, pad:] = prompt
        segments[row, pad:] = 1
        positions[row, :pad] = np.arange(pad)
        positions[row, pad:] = np.arange(len(prompt))
    return tokens, Rows(jnp.asarray(segments), jnp.asarray(positions))


@partial(jax.jit, static_argnames=("definition", "steps", "sampling", "stop"))
def _generate(
    params: lm.Params,
    tokens_BT: jax.Array,
    rows: Rows,
    key: jax.Array,
    *,
    definition: lm.Definition,
    steps: int,
    sampling: Sampling,
    stop: int,
) -> jax.Array:
    model = lm.merge(definition, params)
    batch, length = tokens_BT.shape
    head = model.head_matrix().astype(definition.dtype)
    blocks = model.unstacked()
    row_keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch))

    def choose(hidden_BD: jax.Array, step: jax.Array) -> jax.Array:
        logits = jnp.einsum("bd,dv->bv", hidden_BD, head, preferred_element_type=jnp.float32)
        return sample(logits, jax.vmap(partial(jax.random.fold_in, data=step))(row_keys), sampling)

    hidden, cache = model(tokens_BT, rows, model.init_cache(batch, length + steps))
    assert cache is not None
    first = choose(hidden[:, -1], jnp.int32(0))
    out = jnp.full((batch, steps), stop, jnp.int32).at[:, 0].set(first)

    def running(carry: tuple) -> jax.Array:
        step, token, done, *_ = carry
        return (step < steps) & ~jnp.all(done | (token == stop))

    def advance(carry: tuple) -> tuple:
        step, token, done, position, out, cache = carry
        done = done | (token == stop)
        hidden, cache = model.step(token, Rows(jnp.ones_like(position), position), cache, blocks)
        token = jnp.where(done, stop, choose(hidden, step))
        return step + 1, token, done, position + 1, out.at[:, step].set(token), cache

    done = jnp.zeros((batch,), bool)
    carry = (jnp.int32(1), first, done, rows.positions[:, -1] + 1, out, cache)
    return jax.lax.while_loop(running, advance, carry)[4]


def generate(
    definition: lm.Definition,
    params: lm.Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: int | None = None,
) -> list[list[int]]:
    """Continuations of ``prompts`` (token ids, at least one each, lengths may differ), at most
    ``max_new_tokens`` tokens each and cut before the token ``stop``.
    """
    sampling.check()
    if max_new_tokens < 1:
        raise ConfigError("max_new_tokens", max_new_tokens, "must be at least 1")
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError(
            "prompts", [len(p) for p in prompts], "must be one or more prompts of one or more tokens"
        )
    length = _round_up(max(len(prompt) for prompt in prompts))
    tokens, rows = left_pad(prompts, length)
    out = _generate(
        params,
        jnp.asarray(tokens),
        rows,
        jax.random.key(seed),
        definition=definition,
        steps=_round_up(max_new_tokens),
        sampling=sampling,
        stop=-1 if stop is None else stop,
    )
    return [_until(row[:max_new_tokens].tolist(), stop) for row in np.asarray(out)]


def _round_up(length: int) -> int:
    return -(-length // LENGTH_BUCKET) * LENGTH_BUCKET


def _until(tokens: list[int], stop: int | None) -> list[int]:
    return tokens[: tokens.index(stop)] if stop in tokens else tokens
