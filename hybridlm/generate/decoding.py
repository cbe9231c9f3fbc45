"""Generation: chunked prefill of left-padded prompts, then one compiled loop of single-token steps.

The cache is of fixed size: recurrent states, and a preallocated KV cache for softmax attention. What is drawn
for a row depends on the seed, the row's ``sample`` and the step only, not on the rest of the batch. Prompts
and budgets are padded to a few lengths (`bucket`), so that few programs are compiled.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import model as lm
from hybridlm import sharding
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError
from hybridlm.generate.sampling import GREEDY, Sampling, sample
from hybridlm.loss import capped
from hybridlm.rows import Rows

SHORTEST_BUCKET = 64
PREFILL_CHUNK = 2048  # tokens a row of a prompt that go through the stack at once, on each of `mesh.context`


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
    chunk = math.gcd(length, PREFILL_CHUNK * sharding.parts("time")) if length > PREFILL_CHUNK else length

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


class Carry(NamedTuple):
    """B rows while they are written. step: tokens so far.  out: int32 [B, budget], -1 where there is none."""

    step: jax.Array
    token: jax.Array
    done: jax.Array
    position: jax.Array
    out: jax.Array
    keys: jax.Array
    cache: Any


def _choose(
    model: lm.LM, head_DV: jax.Array, hidden_BD: jax.Array, keys: jax.Array, step: Any, how: Sampling
) -> jax.Array:
    logits = jnp.einsum("bd,dv->bv", hidden_BD, head_DV, preferred_element_type=jnp.float32)
    logits = capped(logits, model.definition.model.logit_cap)
    return sample(logits, jax.vmap(partial(jax.random.fold_in, data=step))(keys), how)


@partial(jax.jit, static_argnames=("definition", "budget", "sampling"))
def _begin(
    weights: lm.Params, tokens_BT: jax.Array, rows: Rows, keys: jax.Array, stops_V: jax.Array, *,
    definition: lm.Definition, budget: int, sampling: Sampling,
) -> Carry:  # fmt: skip
    """The prompts read, and a first token of each row."""
    model = lm.merge(definition, weights)
    batch, length = tokens_BT.shape
    hidden_BD, cache = prefill(model, tokens_BT, rows, model.init_cache(batch, length + budget))
    token = _choose(model, model.head_matrix().astype(definition.dtype), hidden_BD, keys, 0, sampling)
    out = jnp.full((batch, budget), -1, jnp.int32).at[:, 0].set(token)
    return Carry(jnp.int32(1), token, stops_V[token], rows.positions[:, -1] + 1, out, keys, cache)


@partial(jax.jit, static_argnames=("definition", "sampling"), donate_argnums=1)
def _advance(
    weights: lm.Params, carry: Carry, limit: jax.Array, stops_V: jax.Array, *,
    definition: lm.Definition, sampling: Sampling,
) -> Carry:  # fmt: skip
    """Up to ``limit`` tokens, or until every row is done: after a token that ``stops_V`` [V] marks."""
    model = lm.merge(definition, weights)
    head, blocks = model.head_matrix().astype(definition.dtype), model.unstacked()

    def running(carry: Carry) -> jax.Array:
        return (carry.step < limit) & ~jnp.all(carry.done)

    def advance(carry: Carry) -> Carry:
        step, token, done, position, out, keys, cache = carry
        hidden, cache = model.step(token, Rows(jnp.ones_like(position), position), cache, blocks)
        token = _choose(model, head, hidden, keys, step, sampling)
        out = out.at[:, step].set(jnp.where(done, -1, token))
        return Carry(step + 1, token, done | stops_V[token], position + 1, out, keys, cache)

    return jax.lax.while_loop(running, advance, carry)


@partial(jax.jit, static_argnums=0)
def _cast(definition: lm.Definition, params: lm.Params) -> lm.Params:
    return lm.cast_to_compute(definition, params)  # once, not at every token


def stream(
    definition: lm.Definition, params: lm.Params, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
    sampling: Sampling = GREEDY, seed: int = 0, stops: Sequence[int] = (),
    samples: Sequence[int] | None = None, every: int = 0,
) -> Iterator[np.ndarray]:  # fmt: skip
    """New tokens, int32 [B, n], as they come, ``every`` so many (0: all at once); -1 where a row has ended.

    prompts: token ids, at least one each, lengths may differ.  stops: tokens after which a row ends.
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
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(numbers)
    weights, marked = _cast(definition, params), jnp.asarray(marks)
    carry = _begin(
        weights, jnp.asarray(tokens), rows, keys, marked,
        definition=definition, budget=bucket(max_new_tokens), sampling=sampling,
    )  # fmt: skip
    shown = 0
    while shown < max_new_tokens:
        limit = min(shown + every, max_new_tokens) if every else max_new_tokens
        carry = _advance(weights, carry, jnp.int32(limit), marked, definition=definition, sampling=sampling)
        yield np.asarray(carry.out[:, shown:limit])
        if bool(carry.done.all()):
            return
        shown = limit


def continuations(
    definition: lm.Definition, params: lm.Params, prompts: Sequence[Sequence[int]], **options: Any
) -> list[list[int]]:
    """At most ``max_new_tokens`` tokens for each prompt, up to and with the first one in ``stops``.

    options: of `stream`.
    """
    out = np.concatenate(list(stream(definition, params, prompts, **options)), axis=1)
    return [[token for token in row.tolist() if token >= 0] for row in out]


def complete(
    definition: lm.Definition, params: lm.Params, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], *,
    stop: Sequence[str] = (), **options: Any,
) -> list[str]:  # fmt: skip
    """Texts that ``prompts`` (token ids) go on with, cut before the first of the ``stop`` strings.

    A row ends early at one of the tokenizer's ``ends`` and at a token whose text holds a stop string; a stop
    string that spans tokens is cut from the text afterwards, and an empty one stops nothing.
    options: of `stream`.
    """
    rows = continuations(definition, params, prompts, stops=stop_tokens(tokenizer, stop), **options)
    return [written(tokenizer, prompt, row, stop) for prompt, row in zip(prompts, rows, strict=True)]


def stop_tokens(tokenizer: Tokenizer, stop: Sequence[str]) -> list[int]:
    """What ends a text, and what holds a ``stop`` string."""
    encoded = [text.encode() for text in stop if text]
    pieces = enumerate(tokenizer.pieces or ())
    return [*tokenizer.ends, *(i for i, piece in pieces if any(text in piece for text in encoded))]


def written(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], stop: Sequence[str]) -> str:
    """The text of ``tokens`` behind ``prompt``, cut before the first of the ``stop`` strings."""
    text = tokenizer.decode_after(prompt, [token for token in tokens if token not in (-1, *tokenizer.ends)])
    return text[: min([text.find(s) for s in stop if s and s in text], default=len(text))]
