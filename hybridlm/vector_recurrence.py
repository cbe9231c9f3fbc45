"""The element-wise recurrence h_t = exp(g_t) h_{t-1} + x_t, by an associative scan with its own gradient.

Backward is the same recurrence run from the end, so only g and h are kept:
    dh_t = do_t + exp(g_{t+1}) dh_{t+1},   dx_t = dh_t,   dg_t = dh_t exp(g_t) h_{t-1}
"""

import jax
import jax.numpy as jnp


def vector_recurrence(
    x_BTF: jax.Array, log_decay_BTF: jax.Array, starts_BT: jax.Array, state_BF: jax.Array
) -> jax.Array:
    """h [B, T, F] float32; the last one is the next call's state.

    x, log_decay (<= 0): [B, T, F].  starts: bool [B, T], where a document begins and the past is dropped.
    state: [B, F], what came before the first token.
    """
    decay_BTF = jnp.where(starts_BT[..., None], 0, jnp.exp(log_decay_BTF.astype(jnp.float32)))
    return _recurrence(x_BTF.astype(jnp.float32), decay_BTF, state_BF.astype(jnp.float32))


@jax.custom_vjp
def _recurrence(x: jax.Array, decay: jax.Array, state: jax.Array) -> jax.Array:
    return _scan(x.at[:, 0].add(decay[:, 0] * state), decay)


def _forward(x: jax.Array, decay: jax.Array, state: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    h = _recurrence(x, decay, state)
    return h, (h, decay, state)


def _backward(kept: tuple[jax.Array, ...], dh: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    h, decay, state = kept
    after = jnp.concatenate([decay[:, 1:], jnp.zeros_like(decay[:, :1])], axis=1)
    dx = jnp.flip(_scan(jnp.flip(dh, 1), jnp.flip(after, 1)), 1)
    before = jnp.concatenate([state[:, None], h[:, :-1]], axis=1)
    return dx, dx * before, dx[:, 0] * decay[:, 0]


_recurrence.defvjp(_forward, _backward)


def _scan(x: jax.Array, decay: jax.Array) -> jax.Array:
    def combine(left: tuple, right: tuple) -> tuple[jax.Array, jax.Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (decay, x), axis=1)[1]
