"""Generation: chunked prefill of left-padded prompts, then one compiled loop of single-token steps.

The cache is of fixed size: recurrent states, and a preallocated KV cache for softmax attention. What is drawn
for a row depends on the seed, the row's ``sample`` and the step only, not on the rest of the batch. Prompts
and budgets are padded to a few lengths (`bucket`), so that few programs are compiled.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import model as lm
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError
from hybridlm.rows import Rows

SHORTEST_BUCKET = 64
PREFILL_CHUNK = 2048  # tokens a row of a prompt that go through the stack at once


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


def bucket(length: int) -> int:
    """The shortest of 64, 96, 128, 192, 256, 384, ... that is at least ``length``; whole prefill chunks, if
    more than one.
    """
    size = SHORTEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size * 3 // 2 >= length else size * 2
    return size if size <= PREFILL_CHUNK else -(-size // PREFILL_CHUNK) * PREFILL_CHUNK


def prefill(model: lm.LM, tokens_BT: jax.Array, rows: Rows, cache: lm.Cache) -> tuple[jax.Array, lm.Cache]:
    """(final hidden state [B, D] of the last token, cache with all tokens), PREFILL_CHUNK tokens a time."""
    batch, length = tokens_BT.shape
    chunk = min(length, PREFILL_CHUNK)

    def part(cache: lm.Cache, xs: tuple[jax.Array, Rows]) -> tuple[lm.Cache, jax.Array]:
        hidden, appended = model(*xs, cache)
        assert appended is not None
        return appended, hidden[:, -1]

    if length == chunk:
        cache, last = part(cache, (tokens_BT, rows))
        return last, cache
    chunks = lambda x: jnp.moveaxis(x.reshape(batch, length // chunk, chunk), 1, 0)
    cache, lasts = jax.lax.scan(part, cache, jax.tree.map(chunks, (tokens_BT, rows)))
    return lasts[-1], cache


@partial(jax.jit, static_argnames=("definition", "steps", "sampling"))
def _generate(
    params: lm.Params,
    tokens_BT: jax.Array,
    rows: Rows,
    row_keys: jax.Array,
    *,
    definition: lm.Definition,
    steps: int,
    sampling: Sampling,
    limit: jax.Array,
    stops_V: jax.Array,
) -> jax.Array:
    """New tokens [B, steps]; -1 from ``limit`` on, and after a first token that ``stops_V`` [V] marks."""
    model = lm.merge(definition, lm.cast_to_compute(definition, params))  # once, not at every token
    batch, length = tokens_BT.shape
    head = model.head_matrix().astype(definition.dtype)
    blocks = model.unstacked()

    def choose(hidden_BD: jax.Array, step: jax.Array) -> jax.Array:
        logits = jnp.einsum("bd,dv->bv", hidden_BD, head, preferred_element_type=jnp.float32)
        return sample(logits, jax.vmap(partial(jax.random.fold_in, data=step))(row_keys), sampling)

    hidden_BD, cache = prefill(model, tokens_BT, rows, model.init_cache(batch, length + steps))
    first = choose(hidden_BD, jnp.int32(0))
    out = jnp.full((batch, steps), -1, jnp.int32).at[:, 0].set(first)

    def running(carry: tuple) -> jax.Array:
        step, _, done, *_ = carry
        return (step < limit) & ~jnp.all(done)

    def advance(carry: tuple) -> tuple:
        step, token, done, position, out, cache = carry
        hidden, cache = model.step(token, Rows(jnp.ones_like(position), position), cache, blocks)
        token = choose(hidden, step)
        out = out.at[:, step].set(jnp.where(done, -1, token))
        return step + 1, token, done | stops_V[token], position + 1, out, cache

    carry = (jnp.int32(1), first, stops_V[first], rows.positions[:, -1] + 1, out, cache)
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
    stops = [] if stop is None else [stop]
    rows = continuations(
        definition, params, prompts, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stops=stops
    )
    return [row[:-1] if row[-1] == stop else row for row in rows]


def complete(
    definition: lm.Definition,
    params: lm.Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    samples: Sequence[int] | None = None,
) -> list[str]:
    """Texts that continue ``prompts`` (token ids), cut before the first of the ``stop`` strings.

    A row ends early at the document separator and at a token whose text holds a stop string; a stop string
    that spans tokens is cut from the text afterwards, and an empty one stops nothing.
    """
    stop = [text for text in stop if text]
    stops = [tokenizer.doc_id]
    if tokenizer.pieces is not None:
        encoded = [text.encode() for text in stop]
        stops += [i for i, piece in enumerate(tokenizer.pieces) if any(text in piece for text in encoded)]
    rows = continuations(
        definition, params, prompts, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stops=stops,
        samples=samples,
    )  # fmt: skip
    written = ([token for token in row if token != tokenizer.doc_id] for row in rows)
    texts = [tokenizer.decode_after(p, tokens) for p, tokens in zip(prompts, written, strict=True)]
    return [text[: min([text.find(s) for s in stop if s in text], default=len(text))] for text in texts]


def continuations(
    definition: lm.Definition,
    params: lm.Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stops: Sequence[int] = (),
    samples: Sequence[int] | None = None,
) -> list[list[int]]:
    """At most ``max_new_tokens`` tokens for each prompt, up to and with the first one in ``stops``.

    samples: a number for each row that its random draws depend on, in place of its place in the batch: the
        same prompt again needs another, and a row that moves to another batch keeps its own.
    """
    sampling.check()
    if max_new_tokens < 1:
        raise ConfigError("max_new_tokens", max_new_tokens, "must be at least 1")
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError(
            "prompts", [len(p) for p in prompts], "must be one or more prompts of one or more tokens"
        )
    tokens, rows = left_pad(prompts, bucket(max(len(prompt) for prompt in prompts)))
    marks = np.zeros(definition.vocab_size, bool)
    marks[[token for token in stops if token < definition.vocab_size]] = True
    numbers = jnp.arange(len(prompts)) if samples is None else jnp.asarray(samples, jnp.uint32)
    out = _generate(
        params,
        jnp.asarray(tokens),
        rows,
        jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(numbers),
        definition=definition,
        steps=bucket(max_new_tokens),
        sampling=sampling,
        limit=jnp.int32(max_new_tokens),
        stops_V=jnp.asarray(marks),
    )
    return [[token for token in row.tolist() if token >= 0] for row in np.asarray(out)]
