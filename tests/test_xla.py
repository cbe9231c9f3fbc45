"""The chunkwise backend against the float64 token loop and golden vectors, and under transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from op_problems import DECAYS, HV, UPDATES, B, K, V, cast, golden_cases, random_problem, relative_errors, run

from pallas_kernels import linear_attention

COMBINATIONS = [(decay, update) for decay in DECAYS for update in UPDATES]
KINDS = ("mild", "mixed", "strong", "repeated")
# Any length, the same in every run: long ones of several groups of chunks, short ones below one chunk.
LENGTHS = np.random.default_rng(7).integers((300, 1), (601, 33), size=(len(COMBINATIONS), 2)).tolist()
CASES = [(*pair, length) for pair, both in zip(COMBINATIONS, LENGTHS, strict=True) for length in both]


@functools.cache
def oracle(qk_l2norm):
    return run("reference", qk_l2norm)


def check(decay, update, length, dtype, tolerance):
    # Keys of any length would let the delta rule grow without bound; additive updates take them as they are.
    qk_l2norm = update == "delta"
    tested = run("xla", qk_l2norm)
    for seed, kind in enumerate(KINDS):
        x = random_problem(seed, length, decay, update, kind, dtype)
        rng = np.random.default_rng(seed)
        o_bar, state_bar = rng.normal(size=(B, length, HV, V)), rng.normal(size=(B, HV, K, V))
        got = tested(cast(x, dtype), jnp.asarray(o_bar, jnp.float32), jnp.asarray(state_bar, jnp.float32))
        with jax.enable_x64(True):
            want = oracle(qk_l2norm)(cast(x, jnp.float64), jnp.asarray(o_bar), jnp.asarray(state_bar))
        errors = relative_errors(got, want)
        assert all(error <= tolerance for error in errors.values()), (kind, errors)


@pytest.mark.parametrize(
    ("decay", "update", "length"),
    [
        *(
            case if case[0] == "channel" else pytest.param(*case, marks=pytest.mark.once)
            for case in CASES[::2]
        ),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1::2]),
    ],
)
def test_float32_equals_the_float64_recurrence(decay, update, length):
    check(decay, update, length, jnp.float32, 1e-5)


@pytest.mark.parametrize(("decay", "update", "length"), CASES[::2])
@pytest.mark.slow
def test_bfloat16_inputs_equal_the_float64_recurrence(decay, update, length):
    check(decay, update, length, jnp.bfloat16, 1e-2)


@pytest.mark.parametrize(
    "patterns", [("kda/same_key", "kda/beta_edge", "kda/strong"), ("gated_delta_rule/strong",)]
)
def test_golden_vectors(patterns):
    names = {"log_decay": "g", "initial_state": "h0"}
    length = 130
    tested = run("xla")
    for case, _, inputs, expected in golden_cases(*patterns):
        # Tokens that write nothing and keep everything lengthen a case, so that all share one program.
        pad = lambda a: np.pad(a, ((0, 0), (0, length - a.shape[1]), *((0, 0),) * (a.ndim - 2)))
        x = {n: pad(inputs[names.get(n, n)]) for n in ("q", "k", "v", "log_decay", "beta")}
        x["initial_state"] = inputs["h0"]
        got = tested(cast(x, jnp.float32), pad(inputs["do"]), inputs["dht"])
        biggest = max(np.abs(a).max() for name, a in expected.items() if name not in ("o", "ht"))
        for name, a in got.items():
            key = (
                "ht"
                if name == "final_state"
                else name
                if name == "o"
                else "d" + names.get(name[1:], name[1:])
            )
            want = expected[key]
            a = a if key in ("ht", "dh0") else a[:, : want.shape[1]]
            scale = max(np.abs(want).max(), 0 if key in ("o", "ht") else 1e-3 * biggest)
            assert np.abs(a - want).max() <= 5e-6 * scale, (case, key)


def test_nothing_crosses_a_document_boundary():
    x = cast(random_problem(3, 40, "channel", "delta", "mild"), jnp.float32)
    x["segment_ids"] = jnp.arange(40)[None] // 13 + jnp.zeros((B, 1), jnp.int32)
    f = jax.jit(lambda x: linear_attention(**x, qk_l2norm=True, output_final_state=True, backend="xla"))
    o, state = f(x)
    x["v"] = x["v"].at[:, :13].multiply(1e30)
    x["initial_state"] *= 1e30
    changed, changed_state = f(x)
    assert not np.array_equal(o[:, :13], changed[:, :13])
    np.testing.assert_array_equal(o[:, 13:], changed[:, 13:])
    np.testing.assert_array_equal(state, changed_state)


def test_infinite_decay_is_a_reset():
    x = cast(random_problem(4, 10, "head", "additive", "mild"), jnp.float32) | {"segment_ids": None}
    f = jax.jit(jax.grad(lambda g: jnp.sum(linear_attention(**x | {"log_decay": g}, backend="xla")[0])))
    gradient = f(x["log_decay"].at[:, 4].set(-jnp.inf))
    assert np.isfinite(gradient).all()
    assert not gradient[:, 4].any()
    assert gradient[:, :4].any()
    assert gradient[:, 5:].any()


@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay", "beta", "initial_state"])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_what_is_not_finite_does_not_cross_a_reset(decay, name):
    """Also inside a chunk, and to tokens before it; in its document it spoils what comes after."""
    x = cast(random_problem(2, 100, decay, "delta", "mild"), jnp.float32)
    ids = jnp.asarray([[0] * 20 + [1] * 30 + [2] * 50] * B)
    floats = {n: a for n, a in x.items() if n != "segment_ids"}
    where = (slice(None), 0, 1, 2) if name == "initial_state" else (slice(None), 30)
    poisoned = floats | {name: floats[name].at[where].set(jnp.nan)}

    def outputs(floats):
        o, state = linear_attention(
            **floats, segment_ids=ids, qk_l2norm=True, output_final_state=True, backend="xla"
        )
        return o, state

    @jax.jit
    def run_both(floats):
        (o, state), pull = jax.vjp(outputs, floats)
        return o, state, pull((jnp.ones_like(o), jnp.ones_like(state)))[0]

    (o, state, d), (want_o, want_state, want_d) = run_both(poisoned), run_both(floats)
    clean = np.ones(100, bool)
    clean[slice(0, 20) if name == "initial_state" else slice(30, 31 if name == "q" else 50)] = False
    np.testing.assert_allclose(o[:, clean], want_o[:, clean], rtol=1e-5, atol=1e-5)
    heads = 1 if name == "initial_state" else HV
    assert np.isnan(o[:, ~clean][:, :, :heads]).all()
    np.testing.assert_allclose(state, want_state, rtol=1e-5, atol=1e-5)
    for n in set(d) - {"initial_state"}:
        np.testing.assert_allclose(d[n][:, 50:], want_d[n][:, 50:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("beta", "bound"), [(1.9, 2e-5), (2.0, 2e-7 * 1024 * 3)])
def test_equal_keys_and_betas_up_to_two(beta, bound):
    """The docstring's figures; at 2 nothing fades, so that roundings of k.k add up."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 1024, 1, 64)).astype(np.float32) for _ in "qkv")
    k = np.broadcast_to(k[:, :1], k.shape)

    def run(backend, dtype):
        x = [jnp.asarray(a, dtype) for a in (q, k, v)]
        rates = jnp.full((1, 1024, 1), beta, dtype)
        attend = functools.partial(linear_attention, beta=rates, qk_l2norm=True, backend=backend)
        return np.float64(jax.jit(attend)(*x)[0])

    with jax.enable_x64(True):
        want = run("reference", jnp.float64)
    error = np.linalg.norm(run("xla", jnp.float32) - want) / np.linalg.norm(want)
    assert error < bound, error


@pytest.fixture(scope="module")
def small():
    """(function of one example's arrays, a batch of examples, values and gradients computed one by one)."""
    x = cast(random_problem(5, 16, "head", "delta", "mild"), jnp.float32)
    ids = x.pop("segment_ids")

    def loss(x, ids):
        o, state = linear_attention(
            **x, segment_ids=ids, qk_l2norm=True, output_final_state=True, backend="xla"
        )
        return jnp.sum(jnp.sin(o)) + jnp.sum(state**2)

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), x)

        def oracle(x):
            o, state = linear_attention(
                **x, segment_ids=ids, qk_l2norm=True, output_final_state=True, backend="reference"
            )
            return jnp.sum(jnp.sin(o)) + jnp.sum(state**2)

        want = jax.jit(jax.value_and_grad(oracle))(wide)
    return loss, x, ids, want


def check_small(small, total):
    *_, want = small
    got = jax.jit(jax.value_and_grad(total))(small[1])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    errors = relative_errors(got[1], want[1])
    assert all(error <= 1e-5 for error in errors.values()), errors


def test_vmap(small):
    loss, _, ids, _ = small
    one = lambda x, ids: loss(jax.tree.map(lambda a: a[None], x), ids[None])
    check_small(small, lambda x: jnp.sum(jax.vmap(one)(x, ids)))


def test_checkpoint_inside_scan(small):
    loss, _, ids, _ = small
    rows = lambda a: a.reshape(B, 1, *a.shape[1:])

    def body(total, row):
        return total + jax.checkpoint(loss)(*row), None

    check_small(small, lambda x: jax.lax.scan(body, 0.0, (jax.tree.map(rows, x), rows(ids)))[0])


def test_shard_map_with_a_replicated_argument(small):
    loss, x, ids, _ = small
    size = B if jax.device_count() >= B else 1
    mesh = jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])
    split, whole = PartitionSpec("data"), PartitionSpec()
    specs = jax.tree.map(lambda _: split, x)

    def total(x):
        one = lambda x, ids: jax.lax.psum(loss(x, ids), "data")
        return jax.shard_map(one, mesh=mesh, in_specs=(specs, split), out_specs=whole)(x, ids)

    check_small(small, total)


def test_memory_is_linear_in_length():
    def temporary_bytes(length):
        shape = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)
        head = jax.ShapeDtypeStruct((1, length, 4), jnp.float32)
        loss = lambda q, k, v, g, beta: jnp.sum(
            linear_attention(q, k, v, log_decay=g, beta=beta, backend="xla")[0]
        )
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))
        return gradient.lower(shape, shape, shape, head, head).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(4096), temporary_bytes(16384)
    arguments = 4 * (3 * 32 + 2) * 4  # bytes a token
    # Beyond a constant (one group of chunks): re-ordered copies of arguments, cotangents and gradients;
    # 7.6 of them in XLA's plan for an H100, fewer than 4 in that for a CPU.
    copies = 8 if jax.default_backend() == "gpu" else 4
    assert long - short <= copies * (16384 - 4096) * arguments
    assert long <= 4.2 * short


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize(("decay", "update"), [("none", "delta"), ("head", "additive"), ("channel", "delta")])
def test_later_tokens_move_no_bit(backend, decay, update):
    x, y = (cast(random_problem(seed, 70, decay, update, "mixed"), jnp.float32) for seed in (1, 2))
    ids, state = x.pop("segment_ids"), x.pop("initial_state")
    y = {name: jnp.concatenate([a[:, :45], y[name][:, 45:]], axis=1) for name, a in x.items()}
    attend = jax.jit(
        lambda x: linear_attention(
            **x, initial_state=state, segment_ids=ids, qk_l2norm=True, backend=backend
        )[0]
    )
    np.testing.assert_array_equal(attend(x)[:, :45], attend(y)[:, :45])
    assert (attend(x)[:, 45:] != attend(y)[:, 45:]).any()
