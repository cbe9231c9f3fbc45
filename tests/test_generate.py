"""Prefill and decoding against the full forward pass; sampling, stops and batches of several lengths."""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import generate, model
from hybridlm.data import tokenizer
from hybridlm.errors import ConfigError
from hybridlm.generate import Sampling, decoding
from hybridlm.rows import Rows, single_document

FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}  # to compile, not to run
SMALL = {"num_heads": 2, "head_dim": 8}
MIXERS = {
    "full": configs.mixer("attention", num_heads=2, num_kv_heads=1),
    "nope": configs.mixer("attention", num_heads=2, rope_theta=0.0),
    "swa": configs.mixer("attention", num_heads=2, window=5),
    "mla": configs.mixer("mla", num_heads=2),
    "deltanet": configs.mixer("delta_net", **SMALL),
    "gdn": configs.mixer("gated_delta_net", **SMALL),
    "kda": configs.mixer("kda", **SMALL),
    "gla": configs.mixer("gla", num_heads=2),
    "hgrn": configs.mixer("hgrn"),
    "hgrn2": configs.mixer("hgrn2", head_dim=8),
    "retnet": configs.mixer("retnet", **SMALL),
}


@functools.cache
def built(pattern, dtype="float32"):
    config = configs.default()
    config.mixers, config.data = MIXERS, configs.data("mqar")
    config.model.update(pattern=pattern, d_model=16, vocab_size=300, mlp_hidden=32, dtype=dtype, remat="none")
    definition = model.build(configs.resolve(config))
    params = jax.jit(lambda key: model.init(definition, key), compiler_options=FAST)(jax.random.key(0))
    return definition, jax.tree.map(lambda x: 3 * x if x.ndim > 3 else x, params)  # sharper than at birth


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def full_forward(definition, params, tokens):
    return model.logits(definition, params, tokens, single_document(*tokens.shape))


EVERY_KIND = "full mla deltanet gdn kda gla hgrn hgrn2 retnet"


@pytest.mark.parametrize(
    ("pattern", "dtype", "error"),
    [
        (EVERY_KIND, "float32", 2e-5),
        ("kda*3 nope", "float32", 2e-5),
        ("gdn swa", "float32", 2e-5),
        ("retnet*2 mla", "float32", 2e-5),
        ("kda mla", "bfloat16", 2e-2),
    ],
)
@pytest.mark.slow
def test_prefill_and_steps_equal_the_full_forward(monkeypatch, pattern, dtype, error):
    """Prompts of 3 and 14 tokens, prefilled in chunks of 8, then 5 given tokens one at a time."""
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 8)
    definition, params = built(pattern, dtype)
    rng = np.random.default_rng(0)
    prompts, given = [rng.integers(300, size=n) for n in (3, 14)], rng.integers(300, size=(2, 5))

    @functools.partial(jax.jit, compiler_options=FAST)
    def decoded(params, tokens, rows, given):
        lm = model.merge(definition, model.cast_to_compute(definition, params))
        blocks = lm.unstacked()
        hidden, cache = generate.prefill(lm, tokens, rows, lm.init_cache(2, tokens.shape[1] + 5))

        def step(carry, token):
            cache, position = carry
            hidden, cache = lm.step(token, Rows(jnp.ones_like(position), position), cache, blocks)
            return (cache, position + 1), hidden

        _, after = jax.lax.scan(step, (cache, rows.positions[:, -1] + 1), given.T)
        return jnp.concatenate([hidden[None], after]).swapaxes(0, 1) @ lm.head_matrix()

    tokens, rows = generate.left_pad(prompts, 16)
    got = decoded(params, tokens, rows, jnp.asarray(given))
    for row, prompt in enumerate(prompts):
        whole = np.concatenate([prompt, given[row]])[None]
        padded = np.pad(whole, ((0, 0), (0, 19 - whole.shape[1])))  # unseen, as causal: one program
        want = full_forward(definition, params, padded)[0, len(prompt) - 1 : whole.shape[1]]
        np.testing.assert_allclose(got[row], want, atol=error * float(jnp.abs(want).max()))


@pytest.mark.slow
def test_matrices_are_used_in_the_dtype_of_the_model_only():
    """So that one cast before a loop does what a cast at each use did."""
    definition, params = built(EVERY_KIND, "bfloat16")
    params = jax.tree.map(lambda leaf: 1.003 * leaf + 0.003, params)  # ones and zeros round to themselves
    tokens = np.arange(12)[None]
    given = model.cast_to_compute(definition, params)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), given)
    np.testing.assert_array_equal(*(full_forward(definition, p, tokens) for p in (params, rounded)))


def test_the_decoding_loop_casts_no_matrix():
    definition, params = built("kda mla", "bfloat16")
    given = model.cast_to_compute(definition, params)
    shapes = {leaf.shape[2:] for leaf in given.values() if leaf.dtype == jnp.bfloat16}
    tokens, rows = generate.left_pad([[1, 2]], 64)
    options = dict(definition=definition, sampling=generate.GREEDY)
    keys, stops = jax.random.split(jax.random.key(0), 1), jnp.zeros(300, bool)
    begin = functools.partial(decoding._begin, budget=4, **options)
    carry = jax.eval_shape(begin, given, jnp.asarray(tokens), rows, keys, stops)
    traced = decoding._advance.trace(given, carry, jnp.int32(4), stops, **options)
    (loop,) = (eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "while")
    found = {
        eqn.invars[0].aval.shape
        for eqn in equations(loop.params["body_jaxpr"].jaxpr)
        if eqn.primitive.name == "convert_element_type" and eqn.params["new_dtype"] == jnp.bfloat16
    }
    assert len(shapes) > 5 and found and not found & shapes


def equations(jaxpr):
    """Of a jaxpr and of all inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_the_full_forward_and_independent_of_the_batch():
    definition, params = built("gdn swa")
    prompts = [[5], list(range(40, 70)), [7, 8, 9]]
    make = lambda prompts, **kw: generate.continuations(definition, params, prompts, max_new_tokens=6, **kw)
    together = make(prompts)
    for prompt, new in zip(prompts, together, strict=True):
        whole = np.zeros((1, 40), np.int64)
        whole[0, : len(prompt) + 6] = prompt + new
        best = np.argmax(full_forward(definition, params, whole)[0], axis=-1)
        assert best[len(prompt) - 1 : len(prompt) + 5].tolist() == new
    first = together[1]
    assert make(prompts, stops=[first[2]])[1] == first[: first.index(first[2]) + 1]
    hot = Sampling(temperature=2.0)
    assert make(prompts, sampling=hot, seed=1) == make(prompts, sampling=hot, seed=1)
    assert make(prompts, sampling=hot, seed=1) != make(prompts, sampling=hot, seed=2)
    assert make(prompts, sampling=hot, seed=1)[1] == make([[1], prompts[1], [2]], sampling=hot, seed=1)[1]


def test_complete_cuts_at_stop_strings():
    definition, params = built("gdn swa")
    tokens = tokenizer.load("bytes")
    prompts = [[256, *b"state"], [256, *b"gate of decay"]]
    run = lambda *stop: generate.complete(
        definition, params, tokens, prompts, max_new_tokens=20, stop=stop, sampling=Sampling(temperature=5.0)
    )
    whole = run()[1]
    assert len(whole) > 4
    assert run(whole[2])[1] == whole[: whole.index(whole[2])]  # one token, which ends the loop
    pair = whole[2:4]
    assert run(pair)[1] == whole[: whole.index(pair)]  # two tokens, cut from the text
    rows = generate.continuations(
        definition, params, prompts, max_new_tokens=20, stops=range(300), sampling=Sampling(temperature=5.0)
    )
    assert [len(row) for row in rows] == [1, 1]


def test_samples_are_those_of_their_numbers_however_they_are_batched():
    """16 repeats of one prompt in batches of 3, as an evaluation makes them: all differ, and again alike."""
    definition, params = built("gdn swa")
    hot = Sampling(temperature=3.0)
    make = lambda numbers, **options: generate.continuations(
        definition,
        params,
        [[5, 6]] * len(numbers),
        max_new_tokens=8,
        sampling=hot,
        samples=numbers,
        **options,
    )
    batches = [make([*range(at, min(at + 3, 16))]) for at in range(0, 16, 3)]
    repeats = [row for batch in batches for row in batch]
    assert len({tuple(row) for row in repeats}) == 16
    assert make([7, 11, 2]) == [repeats[7], repeats[11], repeats[2]]
    assert make([7])[0] == repeats[7] != make([7], seed=1)[0]


def test_a_stream_is_what_comes_at_once_in_parts():
    definition, params = built("gdn swa")
    options = dict(max_new_tokens=11, sampling=Sampling(temperature=2.0), stops=range(0, 300, 7))
    prompts = [[1, 2, 3], [4], [5, 6]]
    [whole] = generate.stream(definition, params, prompts, **options)
    parts = list(generate.stream(definition, params, prompts, every=4, **options))
    assert [part.shape[1] for part in parts][:-1] == [4] * (len(parts) - 1)
    got = np.concatenate(parts, axis=1)
    np.testing.assert_array_equal(got, whole[:, : got.shape[1]])
    assert (whole[:, got.shape[1] :] == -1).all()  # a stream ends with its longest row


def test_an_empty_stop_string_stops_nothing():
    definition, params = built("gdn swa")
    make = lambda stop: generate.complete(
        definition, params, tokenizer.load("bytes"), [[256, 65]], max_new_tokens=6, stop=stop,
        sampling=Sampling(temperature=3.0),
    )  # fmt: skip
    assert make([""]) == make([]) != [""]


def test_sampling_follows_its_distribution():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    keys = jax.random.split(jax.random.key(0), 4000)
    share = lambda **kw: np.bincount(
        generate.sample(jnp.tile(logits, (4000, 1)), keys, Sampling(**kw)), minlength=4
    ) / 4000  # fmt: skip
    np.testing.assert_allclose(share(temperature=1.0), [0.5, 0.25, 0.15, 0.1], atol=0.04)
    np.testing.assert_allclose(share(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.04)
    np.testing.assert_allclose(share(temperature=1.0, top_p=0.8), [5 / 9, 2.5 / 9, 1.5 / 9, 0], atol=0.04)
    np.testing.assert_allclose(share(temperature=0.0), [1, 0, 0, 0])


def test_buckets_are_few_and_fit():
    sizes = {generate.bucket(n) for n in range(1, 1025)}
    assert sorted(sizes) == [64, 96, 128, 192, 256, 384, 512, 768, 1024]
    for n in (2049, 3000, 5000, 12_289, 100_000):
        size = generate.bucket(n)
        assert n <= size <= 1.5 * n + decoding.PREFILL_CHUNK and size % decoding.PREFILL_CHUNK == 0


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"prompts": [[]]}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"sampling": Sampling(temperature=-1)}, "temperature"),
        ({"sampling": Sampling(temperature=1, top_p=0)}, "top_p"),
        ({"sampling": Sampling(temperature=1, top_k=-1)}, "top_k"),
    ],
)
def test_refusals(fields, field):
    with pytest.raises(ConfigError) as caught:
        generate.continuations(None, None, **({"prompts": [[1]], "max_new_tokens": 1} | fields))
    assert caught.value.field == field
