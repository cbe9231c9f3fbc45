"""Chunkwise linear attention, forward and backward, in float64 numpy: what the Hopper kernels compute.

The decomposition is that of the kernels (docs/kernels.md), one chunk of one value head at a time, every
intermediate kept by name, so that a kernel can be compared piece by piece. Decays are per key channel
throughout; a decay per head is the same number in every channel. Pairs of tokens get their own exp(G_i -
G_j).
"""

import numpy as np

CHUNK = 64
EPS = 1e-6


def _normalise(x):
    r = 1 / np.sqrt((x * x).sum(-1, keepdims=True) + EPS)
    return x * r, r


def _normalise_grad(y, r, dy):
    return r * (dy - y * (y * dy).sum(-1, keepdims=True))


def _gates(g_CK, seg_C, owner):
    """Decay products of a chunk: pair_CCK (0 above the diagonal and across documents), read, write, keep."""
    G = np.cumsum(g_CK, 0)
    causal = np.tril(np.ones((len(g_CK),) * 2, bool)) & (seg_C[:, None] == seg_C[None, :])
    pair = np.exp(np.where(causal[..., None], G[:, None] - G[None, :], -np.inf))
    read = np.exp(G) * (seg_C == owner)[:, None]  # how much of S0 token i sees
    write = np.exp(G[-1] - G) * (seg_C == seg_C[-1])[:, None]  # how much of token i's write is in S1
    keep = np.exp(G[-1]) * (seg_C[-1] == owner)  # how much of S0 is in S1
    return pair, read, write, keep


def chunk_forward(q, k, v, g, beta, S0, seg, owner, scale):
    """One chunk of one head. q, k, g [C,K]; v [C,V]; beta [C] or None; S0 [K,V] -> (o, S1, residuals)."""
    pair, read, write, keep = _gates(g, seg, owner)
    r = dict(q=q, k=k, v=v, beta=beta, S0=S0, pair=pair, read=read, write=write, keep=keep, scale=scale)
    r["Aqk"] = scale * np.einsum("ic,jc,ijc->ij", q, k, pair)
    if beta is None:
        r["u"] = v
    else:
        r["kk"] = np.tril(np.einsum("ic,jc,ijc->ij", k, k, pair), -1)
        r["A"] = np.linalg.inv(np.eye(len(k)) + beta[:, None] * r["kk"])
        r["w"] = v - (k * read) @ S0
        r["u"] = r["A"] @ (beta[:, None] * r["w"])  # V_new
    o = scale * (q * read) @ S0 + r["Aqk"] @ r["u"]
    return o, keep[:, None] * S0 + (k * write).T @ r["u"], r


def chunk_backward(r, do, dS1):
    """Gradients of one chunk, by name: q, k, v, g, beta, S0, and the intermediates the kernels write."""
    q, k, beta, S0, u, pair, read, write, keep, s = (
        r[n] for n in ("q", "k", "beta", "S0", "u", "pair", "read", "write", "keep", "scale")
    )
    d = dict(du=r["Aqk"].T @ do + (k * write) @ dS1)
    dS0 = keep[:, None] * dS1 + s * (q * read).T @ do
    dAqk = s * np.tril(do @ u.T)
    row_q, col = np.einsum("ij,jc,ijc->ic", dAqk, k, pair), np.einsum("ij,ic,ijc->jc", dAqk, q, pair)
    row_k = np.zeros_like(k)
    read_q, write_k = s * read * (do @ S0.T), write * (u @ dS1.T)
    read_k = np.zeros_like(k)
    d["v"] = d["du"]
    if beta is not None:
        dX = r["A"].T @ d["du"]
        d["v"] = beta[:, None] * dX
        dL = -np.tril(dX @ u.T, -1)
        d["beta"] = (dX * r["w"]).sum(1) + (dL * r["kk"]).sum(1)
        dkk = dL * beta[:, None]
        row_k = np.einsum("ij,jc,ijc->ic", dkk, k, pair)
        col = col + np.einsum("ij,ic,ijc->jc", dkk, k, pair)
        read_k = -read * (d["v"] @ S0.T)
        dS0 = dS0 - (k * read).T @ d["v"]
    d["q"] = read_q + row_q
    d["k"] = read_k + write_k + row_k + col
    # G_i gains from every factor exp(G_i ...) of row i, loses through every exp(... - G_i) of column i
    dG = q * (read_q + row_q) + k * (read_k + row_k) - k * (write_k + col)
    dG[-1] += (k * write_k).sum(0) + keep * (dS1 * S0).sum(1)
    d["g"] = np.cumsum(dG[::-1], 0)[::-1]
    d["S0"] = dS0
    return d


def segments(ids):
    """[B, T] ids as whole numbers that count the changes: what `Call.segment_ids` holds."""
    ids = np.asarray(ids)
    batch = len(ids)
    return np.concatenate([np.zeros((batch, 1), int), np.cumsum(ids[:, 1:] != ids[:, :-1], 1)], 1)


def linear_attention_vjp(
    q, k, v, *, log_decay=None, beta=None, initial_state=None, segment_ids=None, scale=None, qk_l2norm=False,
    do=None, d_final_state=None,
):  # fmt: skip
    """The whole op: (o, final_state, grads, kept) in float64; grads is None without `do`.

    kept["h"], kept["dS"] [B,HV,NT,K,V] (state entering a chunk, gradient of the state leaving it),
    kept["A"] [B,NT*64,HV,64], kept["u"] [B,T,HV,V] are what passes between the kernels.
    """
    f64 = lambda x: None if x is None else np.asarray(x, np.float64)
    q, k, v, log_decay, beta, initial_state, do, dS = map(
        f64, (q, k, v, log_decay, beta, initial_state, do, d_final_state)
    )
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    group, scale = HV // H, K**-0.5 if scale is None else scale
    qn, rq = _normalise(q) if qk_l2norm else (q, None)
    kn, rk = _normalise(k) if qk_l2norm else (k, None)
    g = np.zeros((B, T, HV, 1)) if log_decay is None else log_decay.reshape(B, T, HV, -1)
    per_channel = log_decay is not None and log_decay.ndim == 4
    g = np.broadcast_to(g, (B, T, HV, K))
    seg = np.zeros((B, T), int) if segment_ids is None else segments(segment_ids)
    chunks = [slice(t, min(t + CHUNK, T)) for t in range(0, T, CHUNK)]
    NT = len(chunks)
    o, final = np.zeros((B, T, HV, V)), np.zeros((B, HV, K, V))
    kept = dict(h=np.zeros((B, HV, NT, K, V)), dS=np.zeros((B, HV, NT, K, V)), u=np.zeros((B, T, HV, V)))
    kept["A"] = np.zeros((B, NT * CHUNK, HV, CHUNK))
    grads = dict(q=np.zeros_like(q), k=np.zeros_like(k), v=np.zeros_like(v), g=np.zeros((B, T, HV, K)))
    grads["beta"], grads["S0"] = np.zeros((B, T, HV)), np.zeros((B, HV, K, V))
    for b, h in np.ndindex(B, HV):
        S = np.zeros((K, V)) if initial_state is None else initial_state[b, h]
        residuals = []
        for n, c in enumerate(chunks):
            kept["h"][b, h, n] = S
            b_C = None if beta is None else beta[b, c, h]
            owner = seg[b, max(c.start - 1, 0)]
            o[b, c, h], S, r = chunk_forward(
                qn[b, c, h // group],
                kn[b, c, h // group],
                v[b, c, h],
                g[b, c, h],
                b_C,
                S,
                seg[b, c],
                owner,
                scale,
            )
            kept["u"][b, c, h] = r["u"]
            if "A" in r:
                kept["A"][b, c, h, : c.stop - c.start] = r["A"]
            residuals.append(r)
        final[b, h] = S
        if do is None:
            continue
        D = np.zeros((K, V)) if dS is None else dS[b, h]
        for n, c in reversed(list(enumerate(chunks))):
            kept["dS"][b, h, n] = D
            d = chunk_backward(residuals[n], do[b, c, h], D)
            grads["q"][b, c, h // group] += d["q"]
            grads["k"][b, c, h // group] += d["k"]
            grads["v"][b, c, h], grads["g"][b, c, h], D = d["v"], d["g"], d["S0"]
            if beta is not None:
                grads["beta"][b, c, h] = d["beta"]
        grads["S0"][b, h] = D
    if do is None:
        return o, final, None, kept
    if qk_l2norm:
        grads["q"], grads["k"] = _normalise_grad(qn, rq, grads["q"]), _normalise_grad(kn, rk, grads["k"])
    if not per_channel:
        grads["g"] = grads["g"].sum(-1)
    return o, final, grads, kept


def gates(call, length):
    """Numbers per token that the forward keeps, [B, HV, length/64, 8, 64]; rows as in hopper/blocks.py."""
    (B, T, H, _), HV = call.q.shape, call.v.shape[2]
    inverse_norm = lambda x: 1 / np.sqrt((np.asarray(x, np.float64) ** 2).sum(-1) + EPS)  # [B, T, H]
    pad = lambda x, mode="constant": np.pad(
        np.asarray(x, np.float64), ((0, 0), (0, length - T), (0, 0)), mode
    )
    chunked = lambda x: np.swapaxes(x, 1, 2).reshape(B, -1, length // CHUNK, CHUNK)
    one = np.ones((B, length, HV))
    norms = [
        np.repeat(inverse_norm(pad_k), HV // H, 2) if call.qk_l2norm else one
        for pad_k in (
            np.pad(np.asarray(x, np.float64), ((0, 0), (0, length - T), (0, 0), (0, 0)))
            for x in (call.k, call.q)
        )
    ]
    norm_k, norm_q = chunked(norms[0]), call.scale * chunked(norms[1])
    total = np.cumsum(chunked(0 * one if call.log_decay is None else pad(call.log_decay)), -1)
    read, write, carry = np.exp(total), np.exp(total[..., -1:] - total), np.exp(total[..., -1:])
    if call.segment_ids is not None:
        ids = chunked(pad(np.asarray(call.segment_ids)[..., None], "edge"))
        last = ids[..., -1:]
        owner = np.concatenate([ids[:, :, :1, :1], last[:, :, :-1]], 2)
        read, write, carry = read * (ids == owner), write * (ids == last), carry * (owner == last)
    beta = chunked(one if call.beta is None else pad(call.beta))
    rows = (read * norm_k, read * norm_q, write * norm_k, carry, total / np.log(2), norm_k, norm_q, beta)
    return np.stack(np.broadcast_arrays(*rows), 3)
