"""The op with a diagonal plus low-rank transition: against float64 vectors, and packed rows apart.

`golden/dplr`: fla-core 0.6.0's `dplr_recurrence` in float64 (meta in each file); layout as in `golden/ops`.
"""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_problems import relative_errors

from pallas_kernels import dplr

GOLDEN = Path(__file__).parent / "golden" / "dplr"
NAMES = {"g": "log_decay", "h0": "initial_state"}


@pytest.mark.parametrize("name, backend", [("general", "reference"), ("strong", "xla")])
def test_golden_values_and_gradients(name, backend):
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    del arrays["meta"]
    expected = {name: a for name, a in arrays.items() if a.dtype == np.float64}
    with jax.enable_x64(backend == "reference"):
        dtype = jnp.float64 if backend == "reference" else jnp.float32
        x = {name: jnp.asarray(a, dtype) for name, a in arrays.items() if name not in expected}
        o_bar, state_bar = x.pop("do"), x.pop("dht")

        def loss(x):
            o, state = dplr(**{NAMES.get(name, name): a for name, a in x.items()}, backend=backend)
            return jnp.sum(o * o_bar) + jnp.sum(state * state_bar), (o, state)

        gradients, (o, state) = jax.jit(jax.grad(loss, has_aux=True))(x)
    got = {"o": o, "ht": state} | {f"d{name}": a for name, a in gradients.items()}
    errors = relative_errors(got, expected)
    assert all(error <= (1e-12 if backend == "reference" else 1e-5) for error in errors.values()), errors


def test_packed_chunks_equal_the_token_loop_of_documents_apart():
    """Documents of which one starts inside a chunk, one at its edge, one in the last token."""
    bounds, rng = [0, 20, 64, 65], np.random.default_rng(0)
    draw = lambda *shape: 0.4 * rng.normal(size=(2, bounds[-1], 2, *shape))
    x = dict(zip("qkab", (draw(5) for _ in range(4)), strict=True)) | {"v": draw(3)}
    x["log_decay"] = -np.abs(draw(5)) * np.where(rng.uniform(size=(2, bounds[-1], 2, 5)) < 0.1, 400, 1)
    state, ids = rng.normal(size=(2, 2, 5, 3)), np.repeat([1, 2, 1], np.diff(bounds))
    with jax.enable_x64(True):
        o, last = jax.jit(dplr)(**x, initial_state=state, segment_ids=np.broadcast_to(ids, (2, bounds[-1])))
        for start, stop in itertools.pairwise(bounds):
            first = {} if start else {"initial_state": state}
            part = {name: a[:, start:stop] for name, a in x.items()}
            o_part, state_part = dplr(**part, **first, backend="reference")
            np.testing.assert_allclose(np.asarray(o)[:, start:stop], o_part, rtol=0, atol=1e-12)
    np.testing.assert_allclose(last, state_part, rtol=0, atol=1e-12)


def test_a_gradient_keeps_no_states_of_tokens():
    """Elements that the backward pass finds are a multiple of the arguments', far below a state a token."""
    length, size = 16384, 64
    x = jax.ShapeDtypeStruct((1, length, 1, size), jnp.float32)
    kept = jax.eval_shape(lambda *x: jax.vjp(lambda *x: dplr(*x[:5], log_decay=x[5])[0], *x)[1], *[x] * 6)
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) < 12 * length * size


def test_impossible_arguments_are_named():
    x = jnp.zeros((1, 4, 2, 3))
    with pytest.raises(ValueError, match=r"b.shape = \(1, 4, 1, 3\)"):
        dplr(x, x, x, x, x[:, :, :1], log_decay=x)
    with pytest.raises(ValueError, match="pallas"):
        dplr(x, x, x, x, x, log_decay=x, backend="pallas")
