"""The kernels' decomposition against jax.grad of the token recurrence, both in float64."""

import chunk_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest


def recurrence(q, k, v, log_decay, beta, initial_state, segment_ids, qk_l2norm):
    """Token by token; [B,T,...] in, (o, final_state) out."""
    B, _, H, K = q.shape
    HV = v.shape[2]
    if qk_l2norm:
        q, k = (x / jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (jnp.repeat(x, HV // H, 2) for x in (q, k))
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    fresh = jnp.concatenate([jnp.zeros((B, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], 1)

    def token(S, x):
        q, k, v, g, b, fresh = x
        S = jnp.where(fresh[:, None, None, None], 0.0, S * jnp.exp(g)[..., None])
        error = v if beta is None else b[..., None] * (v - jnp.einsum("bhk,bhkv->bhv", k, S))
        S = S + jnp.einsum("bhk,bhv->bhkv", k, error)
        return S, K**-0.5 * jnp.einsum("bhk,bhkv->bhv", q, S)

    per_token = (q, k, v, log_decay, log_decay[..., 0] if beta is None else beta, fresh)
    final, o = jax.lax.scan(token, initial_state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), per_token))
    return jnp.swapaxes(o, 0, 1), final


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("decay", ["none", "head", "strong", "channel"])
@pytest.mark.parametrize("documents", [False, True])
def test_oracle_matches_the_recurrence(delta, decay, documents):
    B, T, H, HV, K, V = 1, 150, 1, 2, 8, 6
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.normal(size=(B, T, h, d)) for h, d in ((H, K), (H, K), (HV, V), (HV, V)))
    S0, dS = rng.normal(size=(2, B, HV, K, V))
    shape = (B, T, HV, K) if decay == "channel" else (B, T, HV)
    g = np.log(rng.uniform(size=shape)) * {"none": 0, "head": 0.1, "strong": 20, "channel": 0.3}[decay]
    beta = 2 * rng.uniform(size=(B, T, HV)) if delta else None
    seg = np.sort(rng.integers(0, 30, (B, T))) if documents else np.zeros((B, T), int)
    with jax.enable_x64(True):
        f = lambda q, k, v, g, beta, S0: recurrence(q, k, v, g, beta, S0, jnp.asarray(seg), delta)
        (o, final), vjp = jax.vjp(f, *jax.tree.map(jnp.asarray, (q, k, v, g, beta, S0)))
        expected = jax.tree.map(np.asarray, vjp((jnp.asarray(do), jnp.asarray(dS))))
    got_o, got_final, grads, _ = chunk_oracle.linear_attention_vjp(
        q,
        k,
        v,
        log_decay=g,
        beta=beta,
        initial_state=S0,
        segment_ids=seg,
        qk_l2norm=delta,
        do=do,
        d_final_state=dS,
    )
    np.testing.assert_allclose(got_o, o, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(got_final, final, rtol=1e-9, atol=1e-11)
    for name, want in zip(("q", "k", "v", "g", "beta", "S0"), expected, strict=True):
        if want is not None:
            np.testing.assert_allclose(grads[name], want, rtol=1e-8, atol=1e-10, err_msg=name)
