"""Contexts that are read once for all that is asked about them.

The decode cache of a model is of fixed size, states and keys alike, so after the context it can be copied:
each question goes on from a copy of its own (a branch). Shape legend: C contexts, B branches, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import generate, loss
from hybridlm import model as lm
from hybridlm.rows import Rows

SHORTEST = 16  # of the padded lengths of what follows a context


class Branches(NamedTuple):
    """A batch. tokens_CT, rows: contexts, padded at their left.
    owner_B: the context of each branch.  forced_BT: what follows it, padded at its right with -1.
    """

    tokens_CT: jax.Array
    rows: Rows
    owner_B: jax.Array
    forced_BT: jax.Array


class Group(NamedTuple):
    """context: token ids.  members: indices of what is asked about it."""

    context: tuple[int, ...]
    members: list[int]


def grouped(contexts: Sequence[Sequence[int]]) -> list[Group]:
    """Equal contexts together, in order of their first."""
    found: dict[tuple[int, ...], list[int]] = {}
    for index, context in enumerate(contexts):
        found.setdefault(tuple(context), []).append(index)
    return [Group(context, members) for context, members in found.items()]


def batches(
    groups: Sequence[Group], following: Sequence[Sequence[int]], extra: int, batch_tokens: int
) -> Iterator[tuple[list[int], Branches]]:
    """(indices of the branches, in order; the batch), longest contexts first.

    following: tokens behind the context, for each branch.  extra: tokens that are written behind those.
    Groups of a bucket of lengths and of one number of members go together; a batch that is not full is filled
    up with its first group, so that few programs are compiled.
    """
    alike: dict[tuple[int, int], list[Group]] = {}
    for group in groups:
        longest = max(len(following[i]) for i in group.members)
        # A group with very many members is cut: each part reads the context again.
        size = generate.bucket(len(group.context))
        most = max(1, batch_tokens // (size + pad(longest) + extra))
        for start in range(0, len(group.members), most):
            part = group.members[start : start + most]
            alike.setdefault((size, len(part)), []).append(Group(group.context, part))
    for (size, members), found in sorted(alike.items(), reverse=True):
        behind = pad(max(len(following[i]) for group in found for i in group.members))
        whole = max(1, batch_tokens // (members * (size + behind + extra)))
        count = min(whole, 1 << (len(found) - 1).bit_length())
        for start in range(0, len(found), count):
            chosen = found[start : start + count]
            filled = chosen + chosen[:1] * (count - len(chosen))
            forced = np.full((count * members, behind), -1, np.int32)
            for row, index in enumerate(i for group in filled for i in group.members):
                forced[row, : len(following[index])] = following[index]
            tokens, rows = generate.left_pad([group.context for group in filled], size)
            owner = np.repeat(np.arange(count), members)
            batch = Branches(jnp.asarray(tokens), rows, jnp.asarray(owner), jnp.asarray(forced))
            yield [i for group in chosen for i in group.members], batch


def pad(length: int) -> int:
    """16, 32, or what `generate.bucket` says."""
    return generate.bucket(length) if length > SHORTEST * 2 else SHORTEST << (length > SHORTEST)


def _branch(model: lm.LM, batch: Branches, room: int) -> tuple[jax.Array, jax.Array, lm.Cache]:
    """([B, D] hidden state of the context's last token, [B] tokens of the context, cache) of each branch."""
    contexts, length = batch.tokens_CT.shape
    hidden_CD, cache = generate.prefill(
        model, batch.tokens_CT, batch.rows, model.init_cache(contexts, length + room)
    )
    copied = jax.tree.map(lambda leaf: leaf[batch.owner_B] if leaf.ndim else leaf, cache)  # lengths have none
    return hidden_CD[batch.owner_B], batch.rows.positions[batch.owner_B, -1] + 1, copied


@partial(jax.jit, static_argnames="definition")
def scores(params: lm.Params, batch: Branches, definition: lm.Definition) -> tuple[jax.Array, jax.Array]:
    """(log probability, whether most probable) of each forced token, [B, T]; see `loss.per_token`."""
    model = lm.merge(definition, params)
    forced, (rows_B, size) = batch.forced_BT, batch.forced_BT.shape
    last_BD, start_B, cache = _branch(model, batch, size)
    positions = start_B[:, None] + jnp.arange(size, dtype=jnp.int32)
    # What pads a branch stands behind all that is scored, and its cache is thrown away.
    hidden, _ = model(jnp.maximum(forced, 0), Rows(jnp.ones((rows_B, size), jnp.int32), positions), cache)
    before = jnp.concatenate([last_BD[:, None], hidden[:, :-1]], axis=1)
    return loss.per_token(before, model.head_matrix(), forced, definition.model.logit_cap)


@partial(jax.jit, static_argnames=("definition", "budget"))
def written(
    params: lm.Params,
    batch: Branches,
    limit: jax.Array,
    stops_V: jax.Array,
    *,
    definition: lm.Definition,
    budget: int,
) -> jax.Array:
    """New tokens [B, budget] behind each branch's forced ones, greedily; -1 from ``limit`` on, and after a
    first token that ``stops_V`` marks. Every branch has a forced token.

    Forced tokens go one at a time, as the written ones do: branches have different numbers of them, and a
    cache counts the tokens of all rows together.
    """
    model = lm.merge(definition, lm.cast_to_compute(definition, params))
    forced, (rows_B, size) = batch.forced_BT, batch.forced_BT.shape
    count_B = (forced >= 0).sum(axis=1)
    _, start_B, cache = _branch(model, batch, size + budget)
    head, blocks = model.head_matrix().astype(definition.dtype), model.unstacked()
    out = jnp.full((rows_B, budget), -1, jnp.int32)

    def running(carry: tuple) -> jax.Array:
        step, _, done, *_ = carry
        return (step < size + budget) & ~jnp.all(done)

    def advance(carry: tuple) -> tuple:
        step, token, done, out, cache = carry
        position = start_B + step
        hidden, cache = model.step(token, Rows(jnp.ones_like(position), position), cache, blocks)
        logits = jnp.einsum("bd,dv->bv", hidden, head, preferred_element_type=jnp.float32)
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        place = step + 1 - count_B  # among the new tokens, of the token that follows
        is_new = (place >= 0) & ~done
        out = out.at[jnp.arange(rows_B), jnp.where(is_new, place, budget)].set(chosen, mode="drop")
        done |= is_new & (stops_V[chosen] | (place + 1 >= limit))
        following = forced[:, jnp.minimum(step + 1, size - 1)]
        return step + 1, jnp.where(place < 0, following, chosen), done, out, cache

    carry = (jnp.int32(0), forced[:, 0], jnp.zeros(rows_B, bool), out, cache)
    return jax.lax.while_loop(running, advance, carry)[3]
