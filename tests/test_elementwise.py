"""The element-wise recurrence against a float64 loop: reference, XLA scan, pieces and checks of arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import elementwise_recurrence
from pallas_kernels.elementwise import Piece, chain, piece, through

B, T, F = 2, 37, 3
DECAYS = [0, 1e-3, 1.0, 20.0, 120.0, 1e30, np.inf]


def loop(x, g, segment_ids, state):
    """h, float64 or complex128, a token at a time."""
    h = []
    for t in range(x.shape[1]):
        if t:
            state = np.where((segment_ids[:, t] != segment_ids[:, t - 1])[:, None], 0, state)
        state = np.exp(g[:, t]) * state + x[:, t]
        h.append(state)
    return np.stack(h, axis=1)


def make_case(length=T, features=F, decays=DECAYS, seed=0, kind=float):
    """(x, log_decay, segment_ids, state, dh, dstate), float64 or complex128."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        real = rng.normal(size=shape)
        return real + 1j * rng.normal(size=shape) if kind is complex else real

    g = -rng.choice(decays, size=(B, length, features))
    if kind is complex:
        g = g + 1j * rng.uniform(-np.pi, np.pi, size=g.shape)
    changes = rng.random((B, length)) < 0.1
    changes[:, 1:3] = True, False  # a document of one token
    changes[-1, : length // 2] = False  # the last row continues its state
    ids = np.cumsum(changes, axis=1) % 3
    tokens = (B, length, features)
    return normal(*tokens), g, ids, normal(B, features), normal(*tokens), normal(B, features)


def run(backend, ids):
    return jax.jit(
        lambda x, g, state: elementwise_recurrence(
            x, g, initial_state=state, segment_ids=ids, backend=backend
        )
    )


def check(function, case, tolerance, names=("h", "final", "dx", "dlog_decay", "dstate")):
    """``function``(x, log_decay, state) -> (h, final) and its gradients against `gradients_loop`."""
    x, g, _, state, dh, dfinal = case
    (h, final), pull = jax.vjp(function, *(jnp.asarray(a, _single(a)) for a in (x, g, state)))
    got = (h, final, *pull((jnp.asarray(dh, h.dtype), jnp.asarray(dfinal, final.dtype))))
    for name, array, want in zip(names, got, gradients_loop(case), strict=True):
        error = np.abs(np.asarray(array) - want).max() / np.abs(want).max()
        assert error < tolerance, (name, error)


def _single(a):
    return jnp.complex64 if np.iscomplexobj(a) else jnp.float32


def gradients_loop(case):
    """(h, final, dx, dlog_decay, dstate) by the chain rule, from the last token to the first."""
    x, g, ids, state, dh, dfinal = case
    h = loop(x, g, ids, state)
    dx, dg, later = np.zeros_like(h), np.zeros_like(h), dfinal
    for t in range(x.shape[1])[::-1]:
        dx[:, t] = dh[:, t] + later
        starts = np.zeros((len(x), 1), bool) if t == 0 else (ids[:, t] != ids[:, t - 1])[:, None]
        later = np.where(starts, 0, dx[:, t] * np.exp(g[:, t]))
        dg[:, t] = later * (state if t == 0 else h[:, t - 1])
    return h, h[:, -1], dx, dg, later


@pytest.mark.parametrize("kind", [float, complex])
@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_values_and_gradients_against_a_float64_loop(backend, kind):
    case = make_case(kind=kind)
    check(run(backend, case[2]), case, 2e-6)


def test_the_chain_rule_of_these_tests_against_slopes():
    x, g, ids, state, dh, dfinal = make_case(decays=[0, 1e-3, 1.0])

    def loss(x, g, state):
        h = loop(x, g, ids, state)
        return (h * dh).sum() + (h[:, -1] * dfinal).sum()

    rng = np.random.default_rng(1)
    for n, gradient in enumerate(gradients_loop((x, g, ids, state, dh, dfinal))[2:]):
        step = 1e-6 * rng.normal(size=gradient.shape)
        moved = lambda sign, n=n, step=step: (
            a + sign * step if m == n else a for m, a in enumerate((x, g, state))
        )
        ends = [loss(*moved(1)), loss(*moved(-1))]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2, (gradient * step).sum(), rtol=1e-6)


def test_float64_is_computed_in_float64():
    case = make_case(decays=[0, 1e-3, 1.0])
    x, g, ids, state, *_ = case
    with jax.enable_x64(True):
        for backend in ("reference", "xla"):
            h, final = run(backend, ids)(x, g, state)
            assert h.dtype == final.dtype == jnp.float64
            np.testing.assert_allclose(h, loop(x, g, ids, state), rtol=1e-12, atol=1e-13)


def test_dtypes_and_defaults():
    x, g, *_ = make_case(decays=[0.1])
    half = jnp.asarray(x, jnp.bfloat16)
    h, final = elementwise_recurrence(half, jnp.asarray(g[0, 0], jnp.float32))
    assert (h.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
    want = loop(np.asarray(half, np.float64), np.broadcast_to(g[0, 0], x.shape), np.zeros((B, T)), 0)
    np.testing.assert_allclose(h, want, rtol=4e-3, atol=1e-6)
    np.testing.assert_allclose(final, want[:, -1], rtol=1e-6)
    h, final = elementwise_recurrence(half, jnp.asarray(g + 1j, jnp.complex64))
    assert (h.dtype, final.dtype) == (jnp.complex64, jnp.complex64)
    none = elementwise_recurrence(half[:, :0], half[:, :0], initial_state=final.real)
    assert none[0].shape == (B, 0, F)
    np.testing.assert_array_equal(none[1], final.real)
    assert elementwise_recurrence(half[:0], half[:0])[0].shape == (0, T, F)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_documents_do_not_leak_what_is_not_a_number(backend):
    x, g, ids, state, dh, dfinal = (jnp.asarray(a) for a in make_case())
    start = int(np.argmax(np.diff(ids[0]) != 0)) + 1
    changes = np.flatnonzero(np.diff(ids[0]) != 0) + 1
    last = int(changes[-1])
    x, state = x.at[0, :start].set(jnp.nan), state.at[0].set(jnp.inf)
    g = g.at[0, start - 1].set(jnp.nan)
    (h, final), pull = jax.vjp(run(backend, ids), x, g, state)
    assert jnp.isnan(h[0, start - 1]).all() and not jnp.isnan(h[0, start:]).any()
    assert not jnp.isnan(final).any()
    dx, dg, _ = pull((dh, dfinal))
    assert not jnp.isnan(dx[0, start:]).any() and not jnp.isnan(dg[0, start:]).any()
    # Backwards: gradients that are not numbers stay in the last document.
    dx, dg, _ = pull((dh.at[0, last:].set(jnp.nan), dfinal))
    assert jnp.isnan(dx[0, last:]).all() and not jnp.isnan(dx[0, start:last]).any()
    assert not jnp.isnan(dg[0, start:last]).any()


@pytest.mark.parametrize("length", [1, 64, 75])
def test_later_inputs_do_not_move_earlier_outputs_in_any_bit(length):
    """Neither by their values nor, for those of T - 1 tokens, by their number."""
    x, g, ids, state, *_ = (jnp.asarray(a) for a in make_case(length=max(length, 4)))
    x, g, ids = x[:, :length], g[:, :length], np.asarray(ids)[:, :length]
    h, _ = run("xla", ids)(x, g, state)
    for cut in {1, length // 2, length - 1}:
        other, _ = run("xla", ids)(x.at[:, cut:].set(1e20), g.at[:, cut:].set(-0.5), state)
        np.testing.assert_array_equal(other[:, :cut], h[:, :cut])
        if cut:
            shorter, _ = run("xla", ids[:, :cut])(x[:, :cut], g[:, :cut], state)
            np.testing.assert_array_equal(shorter, h[:, :cut])


def test_memory_is_linear_in_the_length():
    def compiled(length):
        x = jax.ShapeDtypeStruct((1, length, 64), jnp.float32)
        loss = lambda x, g: elementwise_recurrence(x, g, backend="xla")[0].sum()
        return jax.jit(jax.grad(loss, (0, 1))).lower(x, x).compile().memory_analysis().temp_size_in_bytes

    assert compiled(32768) < 2.1 * compiled(16384) < 2.1 * 12 * 16384 * 64 * 4


@pytest.mark.parametrize("kind", [float, complex])
@pytest.mark.slow
def test_pieces_in_a_chain_are_the_whole(kind):
    x, g, ids, state, *_ = make_case(length=40, kind=kind)
    want = loop(x, g, ids, state)
    x, g, state = (jnp.asarray(a, _single(a)) for a in (x, g, state))
    starts = jnp.pad(jnp.diff(ids, axis=1) != 0, ((0, 0), (1, 0)))
    for size in (40, 8, 5, 1):
        cut = lambda a, size=size: a.reshape(B, -1, size, *a.shape[2:])
        parts = jax.vmap(piece, 1, 1)(cut(x), cut(g), cut(starts))
        before = chain(parts, state)
        np.testing.assert_allclose(before[:, 1:], want[:, size - 1 : -1 : size], rtol=1e-4, atol=1e-5)
        last = jax.tree.map(lambda a: a[:, -1], parts)
        np.testing.assert_allclose(through(last, before[:, -1]), want[:, -1], rtol=1e-4, atol=1e-5)
        # The pieces' own states, each from where it starts.
        flat = lambda a: a.reshape(-1, *a.shape[2:])
        first = jnp.where(cut(starts)[:, :, :1], 0, before)
        ends = elementwise_recurrence(
            *(flat(cut(a)) for a in (x, g)), initial_state=flat(first), segment_ids=flat(cut(ids))
        )
        np.testing.assert_allclose(ends[0].reshape(want.shape), want, rtol=1e-4, atol=1e-5)


def test_a_reset_in_a_piece_stops_what_is_not_a_number():
    x, g = jnp.ones((1, 4, 2)), jnp.zeros((1, 4, 2))
    starts = jnp.array([[False, False, True, False]])
    with_reset, without = piece(x, g, starts), piece(x, g)
    nan = jnp.full((1, 2), jnp.nan)
    np.testing.assert_array_equal(through(with_reset, nan), [[2.0, 2.0]])
    assert jnp.isnan(through(without, nan)).all()
    pair = zip(with_reset, piece(x, g, starts & False), strict=True)
    both = Piece(*(jnp.stack([a, b], 1) for a, b in pair))
    np.testing.assert_array_equal(chain(both, nan)[:, 1], [[2.0, 2.0]])
    np.testing.assert_array_equal(chain(both, jnp.ones((1, 2)), reverse=True)[:, 0], [[5.0, 5.0]])


def test_ids_of_64_bits_are_compared_whole():
    ids = np.array([[1, 1 + 2**32, 1 + 2**32]])
    h, _ = elementwise_recurrence(jnp.ones((1, 3, 1)), jnp.zeros((1, 3, 1)), segment_ids=ids)
    np.testing.assert_array_equal(h[0, :, 0], [1, 1, 2])


@pytest.mark.slow
def test_vmapped():
    x, g, ids, state, *_ = (jnp.asarray(a) for a in make_case())
    call = lambda x, g, ids, state: elementwise_recurrence(x, g, initial_state=state, segment_ids=ids)
    rows = jax.vmap(call)(*(a[:, None] for a in (x, g, ids, state)))
    whole = call(x, g, ids, state)
    for got, want in zip(rows, whole, strict=True):
        np.testing.assert_array_equal(got[:, 0], want)


GOOD = functools.partial(jnp.zeros, (2, 5, 3))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", dict(x=jnp.zeros((2, 5)))),
        ("x", dict(x=jnp.zeros((2, 5, 3), jnp.int32))),
        ("x", dict(x=3.0)),
        ("log_decay", dict(log_decay=jnp.zeros((2, 5, 4)))),
        ("log_decay", dict(log_decay=jnp.zeros((5, 3)))),
        ("initial_state", dict(initial_state=jnp.zeros((2, 4)))),
        ("initial_state", dict(initial_state=jnp.zeros((2, 3), jnp.complex64))),
        ("segment_ids", dict(segment_ids=jnp.zeros((2, 4), jnp.int32))),
        ("segment_ids", dict(segment_ids=jnp.zeros((2, 5)))),
        ("backend", dict(backend="fast")),
    ],
)
def test_bad_arguments_are_named(name, change):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        elementwise_recurrence(**dict(x=GOOD(), log_decay=GOOD()) | change)
