"""The token loop against float64 PyTorch results, and its resets against documents run one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_problems import golden_cases, random_problem, relative_errors

from pallas_kernels import linear_attention

ARGUMENTS = {"g": "log_decay", "h0": "initial_state"}


@pytest.mark.parametrize("case", list(golden_cases("*/*")), ids=lambda case: case[0])
def test_golden_values_and_gradients_in_float64(case):
    _, meta, inputs, expected = case
    with jax.enable_x64(True):
        x = {name: jnp.asarray(a, jnp.float64) for name, a in inputs.items()}
        o_bar, state_bar = x.pop("do"), x.pop("dht")

        def loss(x):
            o, state = linear_attention(
                **{ARGUMENTS.get(name, name): a for name, a in x.items()},
                scale=meta["kwargs"].get("scale"),
                qk_l2norm=bool(meta["l2norm_inside"]),
                output_final_state=True,
                backend="reference",
            )
            return jnp.sum(o * o_bar) + jnp.sum(state * state_bar), (o, state)

        gradients, (o, state) = jax.jit(jax.grad(loss, has_aux=True))(x)
    got = {"o": o, "ht": state} | {f"d{name}": a for name, a in gradients.items()}
    errors = relative_errors(got, expected)
    assert all(error <= 1e-12 for error in errors.values()), errors


def test_packed_documents_equal_documents_apart():
    x = random_problem(0, 12, "channel", "delta", "mild")
    ids = np.array([7, 7, 7, 2, 7, 7, 7, 7, 7, 0, 0, 0])  # the reused 7 is another document
    spans = [(0, 3), (3, 4), (4, 9), (9, 12)]
    x["segment_ids"] = np.broadcast_to(ids, x["segment_ids"].shape)
    run = lambda x: linear_attention(**x, qk_l2norm=True, output_final_state=True, backend="reference")
    with jax.enable_x64(True):
        o, state = run(jax.tree.map(jnp.asarray, x))
        for start, stop in spans:
            part = {
                n: jnp.asarray(a[:, start:stop])
                for n, a in x.items()
                if n not in ("segment_ids", "initial_state")
            }
            if start == 0:
                part["initial_state"] = jnp.asarray(x["initial_state"])
            o_part, state_part = run(part)
            np.testing.assert_array_equal(np.asarray(o)[:, start:stop], o_part)
    np.testing.assert_array_equal(state, state_part)
