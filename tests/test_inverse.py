"""The triangular solve of the delta rule against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from op_problems import relative_errors

from pallas_kernels.linear_attention.inverse import solve_unit_lower


def test_solve_and_gradients_hold_up_with_repeated_keys():
    """beta = 2 and one key for all tokens: every entry of L is 2, and powers of L reach 1e29."""
    rng = np.random.default_rng(0)
    mixed = np.tril(rng.choice([0.0, 0.1, 1.9, 2.0], size=(64, 64)), -1) * (rng.random((64, 1)) < 0.2)
    L = np.stack([np.tril(np.full((64, 64), 2.0), -1), mixed])
    rhs, bar = rng.normal(size=(2, 2, 64, 3))
    solution = np.linalg.solve(np.eye(64) + L, rhs)
    rhs_bar = np.linalg.solve((np.eye(64) + L).mT, bar)
    want = {"solution": solution, "L": -np.tril(rhs_bar @ solution.mT, -1), "rhs": rhs_bar}

    @jax.jit
    def run(L, rhs, bar):
        # What stands on and above the diagonal is not read.
        full = L + jnp.triu(jnp.full((64, 64), 7.0))
        solution, vjp = jax.vjp(lambda L, rhs: solve_unit_lower(L, rhs, Precision.HIGHEST), full, rhs)
        return dict(zip(want, (solution, *vjp(bar)), strict=True))

    got = run(*(jnp.asarray(a, jnp.float32) for a in (L, rhs, bar)))
    errors = relative_errors(got, want)
    assert all(error <= 1e-5 for error in errors.values()), errors
