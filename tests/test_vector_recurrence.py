import jax
import jax.numpy as jnp
import numpy as np

from hybridlm.vector_recurrence import vector_recurrence


def loop(x, g, starts, state):
    h = []
    for t in range(x.shape[1]):
        state = np.where(starts[:, t, None], 0, np.exp(g[:, t]) * state) + x[:, t]
        h.append(state)
    return np.stack(h, axis=1)


def test_values_and_gradients_against_a_float64_loop():
    rng = np.random.default_rng(0)
    x, state = rng.normal(size=(2, 37, 3)), rng.normal(size=(2, 3))
    g = -rng.choice([0, 1e-3, 1.0, 20.0, 120.0], size=x.shape)
    starts = np.zeros((2, 37), bool)
    starts[0, [0, 11, 12]] = starts[1, 30] = True  # the second row continues its state
    arguments = [jnp.float32(a) for a in (x, g, state)]
    run = jax.jit(lambda x, g, state: vector_recurrence(x, g, starts, state))
    h = run(*arguments)
    expected = loop(x, g, starts, state)
    np.testing.assert_allclose(h, expected, rtol=0, atol=1e-6 * np.abs(expected).max())

    dh = rng.normal(size=x.shape)
    grads = jax.jit(jax.grad(lambda *a: (run(*a) * np.float32(dh)).sum(), (0, 1, 2)))(*arguments)
    directions = [rng.normal(size=grad.shape) for grad in grads]

    def along(n, step):  # the float64 loss, its nth input moved
        moved = [
            a + step * d * (m == n) for m, (a, d) in enumerate(zip((x, g, state), directions, strict=True))
        ]
        return (loop(moved[0], moved[1], starts, moved[2]) * dh).sum()

    for n, (grad, direction) in enumerate(zip(grads, directions, strict=True)):
        slope = (along(n, 1e-6) - along(n, -1e-6)) / 2e-6
        np.testing.assert_allclose((np.asarray(grad) * direction).sum(), slope, rtol=1e-4)
