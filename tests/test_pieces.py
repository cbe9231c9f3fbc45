"""A sequence cut into pieces equals the whole, in float64, with its gradients; and across devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_problems import DECAYS, UPDATES, random_problem, relative_errors, run

from pallas_kernels import linear_attention
from pallas_kernels.linear_attention.op import normalize
from pallas_kernels.linear_attention.pieces import chain, summarize

OPTIONS = dict(qk_l2norm=True, output_final_state=True)


def cut(x, pieces):
    """The arguments of each piece; for each, whether it continues the document before it."""
    per_token = {name: a for name, a in x.items() if name != "initial_state"}
    split = {name: jnp.split(a, pieces, axis=1) for name, a in per_token.items()}
    parts = [{name: a[p] for name, a in split.items()} for p in range(pieces)]
    ids = [part["segment_ids"] for part in parts]
    joints = [a[:, -1] == b[:, 0] for a, b in itertools.pairwise(ids)]
    return parts, [jnp.ones_like(joints[0]), *joints]


def in_pieces(pieces, x):
    """The op's results, all pieces at once."""
    first = x["initial_state"]
    parts, continues = cut(x, pieces)
    summaries = [summarize(normalize(**part, qk_l2norm=True)) for part in parts]
    states = chain(*zip(*summaries, strict=True), first, continues=continues)
    runs = [
        linear_attention(**part, initial_state=state, backend="reference", **OPTIONS)
        for part, state in zip(parts, states[:-1], strict=True)
    ]
    np.testing.assert_array_equal(np.shape(runs[-1][1]), np.shape(states[-1]))
    return jnp.concatenate([o for o, _ in runs], axis=1), states[-1]


# Few documents, and many: with joints of both kinds.
CASES = zip(
    itertools.product(DECAYS, UPDATES), itertools.cycle(("mild", "mixed", "mixed", "mild")), strict=False
)


@pytest.mark.parametrize(("decay", "update", "kind"), [(*pair, kind) for pair, kind in CASES])
@pytest.mark.slow
def test_pieces_equal_the_whole(decay, update, kind):
    with jax.enable_x64(True):
        x = {n: jnp.asarray(a) for n, a in random_problem(3, 60, decay, update, kind, jnp.float64).items()}
        rng = np.random.default_rng(0)
        bars = rng.normal(size=x["v"].shape), rng.normal(size=x["initial_state"].shape)
        ids = x.pop("segment_ids")

        @jax.jit
        def pieces(x):
            loss = lambda x: in_pieces(4, x | {"segment_ids": ids})
            (o, state), pull = jax.vjp(loss, x)
            (d,) = pull(tuple(map(jnp.asarray, bars)))
            return {"o": o, "final_state": state} | {f"d{name}": a for name, a in d.items()}

        got = pieces(x)
        want = run("reference", qk_l2norm=True)(x | {"segment_ids": ids}, *bars)
        errors = relative_errors(got, want)
    assert max(errors.values()) < 1e-10, errors


def test_without_documents_and_from_nothing():
    with jax.enable_x64(True):
        x = {
            n: jnp.asarray(a) for n, a in random_problem(4, 48, "head", "delta", "mild", jnp.float64).items()
        }
        del x["segment_ids"], x["initial_state"]
        parts = [{n: a[:, start : start + 16] for n, a in x.items()} for start in (0, 16, 32)]
        states = chain(*zip(*(summarize(normalize(**part)) for part in parts), strict=True))
        for end, state in zip((16, 32, 48), states[1:], strict=True):
            upto = {n: a[:, :end] for n, a in x.items()}
            want = linear_attention(**upto, output_final_state=True, backend="reference")[1]
            np.testing.assert_allclose(state, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("update", UPDATES)
def test_members_of_an_axis_chain_their_pieces(update):
    """As devices would: all-gather of summaries and of the ids at the joints, then one call of the op."""
    x = {n: jnp.asarray(a) for n, a in random_problem(5, 64, "channel", update, "mild").items()}
    first = x.pop("initial_state")

    def member(x):
        summary = summarize(normalize(**x, qk_l2norm=True))
        gather = functools.partial(jax.lax.all_gather, axis_name="time")
        ids = x["segment_ids"]
        starts, ends = gather(ids[:, 0]), gather(ids[:, -1])
        continues = jnp.concatenate([jnp.ones_like(starts[:1], bool), starts[1:] == ends[:-1]])
        states = chain(gather(summary.move), gather(summary.alone), first, continues=continues)
        own = jnp.stack(states)[jax.lax.axis_index("time")]
        return linear_attention(**x, initial_state=own, qk_l2norm=True, backend="xla")[0]

    split = {name: jnp.stack(jnp.split(a, 4, axis=1)) for name, a in x.items()}
    got = jnp.concatenate(jax.jit(jax.vmap(member, axis_name="time"))(split), axis=1)
    want = linear_attention(**x, initial_state=first, qk_l2norm=True, backend="reference")[0]
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
