import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from test_layers import close, load

from hybridlm.forget_gate import LowerBounds, cumulative, log_forget

# tests/flags.py: there a sigmoid is half of 1 + tanh, which loses digits where it is small.
GATE = 2e-5


def test_bounds_and_gate_against_the_reference():
    _, a = load("gate_hgrn2")
    gate = jax.jit(lambda f, P: (log_forget(f, cumulative(P)), cumulative(P)))
    (g, lb), pull = jax.vjp(gate, jnp.asarray(a["f"]), jnp.asarray(a["P"]))
    close(g, a["g"], GATE)
    close(lb, a["lb"])
    df, dP = pull((jnp.asarray(a["dg"]), jnp.asarray(a["dlb"])))
    close(df, a["grad_f"], GATE)
    close(dP, a["grad_P"], 1e-5)


def test_bounds_rise_evenly_at_first_and_can_be_left_out():
    learned = LowerBounds(4, 3, True, rngs=nnx.Rngs(params=0))
    np.testing.assert_allclose(learned.per_layer()[:, 0], [0, 0.25, 0.5, 0.75], atol=1e-7)
    assert jax.tree.leaves(nnx.state(LowerBounds(4, 3, False, rngs=nnx.Rngs(params=0)))) == []
    extreme = jnp.array([-200.0, 0.0, 200.0])
    np.testing.assert_allclose(log_forget(extreme, jnp.zeros(3)), [-200, -np.log(2), 0], rtol=1e-6)
    grads = jax.jit(jax.grad(lambda f, lb: log_forget(f, lb).sum(), (0, 1)))(extreme, jnp.zeros(3))
    assert np.isfinite(grads).all()
