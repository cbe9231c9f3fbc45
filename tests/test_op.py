"""What the op accepts, and its single-token step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_problems import cast, random_problem

from pallas_kernels import linear_attention, linear_attention_step


def arguments(**changes):
    zeros = lambda *shape: jnp.zeros(shape)
    return {"q": zeros(2, 5, 2, 4), "k": zeros(2, 5, 2, 4), "v": zeros(2, 5, 4, 3)} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((2, 5, 2, 4), int)}, r"q.dtype = int32: must be one of bfloat16, float16, float32"),
        ({"q": 1.0}, r"q = 1.0: must be an array"),
        ({"q": jnp.zeros((2, 5, 4))}, r"q.shape = \(2, 5, 4\): must have 4 axes"),
        ({"q": jnp.zeros((2, 0, 2, 4))}, r"q.shape = \(2, 0, 2, 4\): must have T >= 1"),
        ({"q": jnp.zeros((2, 5, 2, 0))}, r"q.shape = \(2, 5, 2, 0\): must have T >= 1 and K >= 1"),
        ({"v": jnp.zeros((2, 5, 4, 0))}, r"v.shape = \(2, 5, 4, 0\): must have V >= 1"),
        ({"k": jnp.zeros((2, 5, 4, 4))}, r"k.shape = \(2, 5, 4, 4\): must be \(2, 5, 2, 4\) to match"),
        ({"v": jnp.zeros((2, 4, 4, 3))}, r"v.shape = \(2, 4, 4, 3\): must be \(2, 5, 4, 3\)"),
        (
            {"v": jnp.zeros((2, 5, 3, 3))},
            r"v.shape = \(2, 5, 3, 3\): its 3 heads must be a multiple of q's 2",
        ),
        ({"log_decay": jnp.zeros((2, 5, 2))}, r"log_decay.shape = .*: must be \(2, 5, 4\) or \(2, 5, 4, 4\)"),
        ({"beta": jnp.zeros((2, 5, 4, 1))}, r"beta.shape = \(2, 5, 4, 1\): must be \(2, 5, 4\)"),
        ({"initial_state": jnp.zeros((2, 4, 3, 4))}, r"initial_state.shape = .*: must be \(2, 4, 4, 3\)"),
        ({"segment_ids": jnp.zeros((2, 4), int)}, r"segment_ids.shape = \(2, 4\): must be \(2, 5\)"),
        ({"segment_ids": jnp.zeros((2, 5))}, r"segment_ids.dtype = float32: must be an integer"),
        ({"scale": "big"}, r"scale = 'big': must be a finite Python number"),
        ({"scale": float("nan")}, r"scale = nan: must be a finite Python number"),
        (
            {"backend": "cuda"},
            r"backend = 'cuda': must be one of auto, reference, xla, pallas, hopper, triton",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments(**changes))


def test_outputs_have_the_promised_dtypes():
    x = arguments(v=jnp.zeros((2, 5, 4, 3), jnp.bfloat16))
    for backend in ("reference", "xla"):
        run = lambda x, backend=backend: linear_attention(**x, output_final_state=True, backend=backend)
        o, state = jax.eval_shape(run, x)
        assert (o.shape, o.dtype, state.shape, state.dtype) == (
            (2, 5, 4, 3),
            jnp.bfloat16,
            (2, 4, 4, 3),
            jnp.float32,
        )
    assert jax.eval_shape(linear_attention, **x)[1] is None


@pytest.mark.parametrize(("decay", "update"), [("none", "delta"), ("head", "additive"), ("channel", "delta")])
def test_steps_equal_the_op(decay, update):
    x = cast(random_problem(1, 6, decay, update, "mild"), jnp.float32)
    del x["segment_ids"]
    settings = {"scale": 0.3, "qk_l2norm": True}
    whole = functools.partial(linear_attention, output_final_state=True, backend="reference", **settings)
    o, final = jax.jit(whole)(**x)
    state = x.pop("initial_state")
    step = jax.jit(
        lambda state, q, k, v, **gates: linear_attention_step(q, k, v, state=state, **gates, **settings)
    )
    for t in range(6):
        o_t, state = step(state, **{name: a[:, t] for name, a in x.items()})
        np.testing.assert_allclose(o_t, o[:, t], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(state, final, rtol=1e-6, atol=1e-6)


def test_step_takes_any_leading_axes_and_keeps_dtypes():
    x = cast(random_problem(2, 3, "channel", "delta", "mild"), jnp.float32)
    del x["segment_ids"]
    x["state"] = jnp.stack([x.pop("initial_state")] * 3, axis=1)  # the T axis serves as one more batch axis
    x["v"] = x["v"].astype(jnp.bfloat16)
    step = jax.jit(lambda q, k, v, **rest: linear_attention_step(q, k, v, **rest))
    o, state = step(**x)
    assert (o.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    o_one, state_one = step(**{name: a[1, 2] for name, a in x.items()})
    np.testing.assert_allclose(o[1, 2].astype(float), o_one.astype(float), rtol=1e-2)
    np.testing.assert_allclose(state[1, 2], state_one, rtol=1e-5, atol=1e-6)
    x["state"] = x["state"].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"state.dtype = bfloat16: must be float32 or float64"):
        step(**x)


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("by", [2**32, -(2**40)])
def test_ids_of_64_bits_are_told_apart(backend, by):
    """As NumPy gives them: JAX would keep their lower 32 bits."""
    x = cast(random_problem(1, 6, "head", "delta", "mild"), jnp.float32)
    run = lambda ids: linear_attention(**x | {"segment_ids": ids}, backend=backend)[0]
    wide = np.array([[7, 7, 7 + by, 7 + by, 7, 7]] * 2)
    np.testing.assert_array_equal(run(wide), run(np.array([[0, 0, 1, 1, 0, 0]] * 2, np.int32)))
    np.testing.assert_array_equal(run(wide.astype(np.uint64)), run(wide))


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_no_rows_are_no_error(backend):
    x = {name: a[:0] for name, a in random_problem(1, 6, "channel", "delta", "mild").items()}
    x = {name: jnp.asarray(a) for name, a in x.items()}
    run = lambda q: linear_attention(**x | {"q": q}, output_final_state=True, backend=backend)
    (o, state), pull = jax.vjp(run, x["q"])
    assert (o.shape, state.shape) == (x["v"].shape, x["initial_state"].shape)
    assert pull((o, state))[0].shape == x["q"].shape


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize(("decay", "update"), [("none", "additive"), ("head", "delta"), ("channel", "delta")])
def test_ranks_need_no_promotion(backend, decay, update):
    x = cast(random_problem(1, 20, decay, update, "mild"), jnp.float32)
    ids = x.pop("segment_ids")
    loss = lambda x: jnp.sum(linear_attention(**x, segment_ids=ids, qk_l2norm=True, backend=backend)[0])
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(jax.grad(loss), x)
