"""Untracked: old and new chunk gradients on a GPU. python try_chunkgrad.py times|cases FLAGFILE"""
import dataclasses, os, sys, time
START = time.time()
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, "tests"); sys.path.insert(0, ".")
import jax, jax.numpy as jnp, numpy as np
from benchmarks import gpu_profile
from pallas_kernels.linear_attention.hopper import channel_backward_chunks as old, channel_backward_columns as new, inputs, table
import try_chunkgrad_v1 as v1

BF16, F32 = jnp.bfloat16, jnp.float32
MODULES = dict(old=old, new=new, v1=v1)

def say(*what):
    print(f"[{time.time() - START:.0f} s]", *what, flush=True)

def compiled(jobs):
    with ThreadPoolExecutor(12) as pool:
        out = list(pool.map(lambda job: job.compile(), jobs))
    say(f"compiled {len(jobs)}")
    return out

def rel(got, want):
    got, want = (np.asarray(jnp.asarray(x).astype(F32), np.float64) for x in (got, want))
    return round(1e3 * float(np.linalg.norm(got - want) / np.linalg.norm(want)), 3)

def data(B, T, H, delta, K=128):
    """Arguments of chunk_gradients; gates so slow that any number of levels is right."""
    n, key = T // 64, iter(jax.random.split(jax.random.key(0), 16))
    normal = lambda *s, scale=1.0: scale * jax.random.normal(next(key), s, BF16)
    q, k, u, do, dv = (normal(B, T, H, K) for _ in range(5))
    g = (jax.nn.log_sigmoid(normal(B, T, H, K).astype(F32)) * 0.2).astype(BF16)
    h, dh = (normal(B, H, n, K, K, scale=0.3) for _ in range(2))
    beta = jax.nn.sigmoid(normal(B, H, T).astype(F32))
    rows = lambda x: jnp.swapaxes(x, 1, 2).reshape(B, H, n, 64)
    norm = lambda x: jax.lax.rsqrt(jnp.sum(x.astype(F32) ** 2, -1) + 1e-6) if delta else jnp.full(x.shape[:-1], 1.0)
    if not delta:
        k = k * K**-0.5
    norms = jnp.stack([rows(norm(k)), rows(norm(q)) * K**-0.5, jnp.full((B, H, n, 64), 64.0)], 3)
    carry = jnp.exp(jnp.swapaxes(g.astype(F32).reshape(B, n, 64, H, K).sum(2), 1, 2))
    arrays = dict(q=q, k=k, v=u, log_decay=g, beta=beta if delta else None, segment=None, entering=None, state=None)
    return arrays, norms, (carry, h, dh, u, do, dv if delta else None)

def lowered(which, args, K=128):
    def run(arrays, norms, rest):
        prepared = inputs.Inputs(**arrays, scale=K**-0.5, l2norm=arrays["beta"] is not None, interpret=False)
        return MODULES[which].chunk_gradients(prepared, norms, *rest, run=8)
    return jax.jit(run).lower(*args)

def times(flag):
    jobs, todo = [], []
    for B, T, H in ((8, 4096, 16), (1, 2048, 12)):
        for delta in (True, False):
            args = data(B, T, H, delta)
            for which in MODULES if B == 8 else ("old", "new"):
                jobs.append(lowered(which, args)); todo.append((f"{'KDA' if delta else 'GLA'} {B}x{T}x{H}", which, args))
    say("lowered")
    for f, (name, which, args) in zip(compiled(jobs), todo):
        got = jax.block_until_ready(f(*args))
        if which == "old":
            want = got
        else:
            same = all(bool(jnp.array_equal(x, y)) for x, y in zip(got, f(*args)) if x is not None)
            say(name, which, "against old, 1e-3 (dq dk dg dbeta):", [rel(x, y) for x, y in zip(got, want) if x is not None], "same bits", same)
        best = []
        for _ in range(3):
            rows = gpu_profile.kernels(lambda: [f(*args) for _ in range(10)][-1])
            best.append(round(sum(ms for n, _, ms in rows if "gradients" in n) / 10, 4))
        say(name, which, "ms a call:", best)
        if name.endswith("12"):  # finer levels, each right here
            arrays, norms, rest = args
            spans = 2.0 ** jax.random.randint(jax.random.key(1), norms.shape[:3], 1, 7)
            got = f(arrays, norms.at[:, :, :, 2].set(spans[..., None]), rest)
            say(name, which, "many levels against old, one level, 1e-3:", [rel(x, y) for x, y in zip(got, want) if x is not None])
    open(flag, "w").write("done")

def cases(flag):
    import test_hopper_channel_backward as t
    from pallas_kernels.linear_attention import hopper
    names = dict(q="q", k="k", v="v", log_decay="g", beta="beta", initial_state="S0")
    jobs, todo = [], []
    for name, dim in (("delta, documents, groups, ragged", 128), ("delta, gates of -1e4, zero decay", 128), ("additive, documents, gates of -20 in bf16", 128), ("delta", 64)):
        call, do, d_state = t.make_case(**{"tokens": 320} | t.CASES[name] | {"dim": dim})
        _, _, want, _ = t.expect(call, do, d_state)
        leaves = {n: getattr(call, n) for n in names if getattr(call, n) is not None}
        table.CHANNELS_AS_ROWS = True
        def run(leaves, *d, call=call):
            attend = lambda leaves: hopper.linear_attention(dataclasses.replace(call, **leaves))
            return jax.vjp(attend, leaves)[1](d)[0]
        jobs.append(jax.jit(run).lower(leaves, do, d_state)); todo.append((dim, name, leaves, do, d_state, want))
    ready = compiled(jobs)
    while not os.path.exists(flag) and time.time() - START < 80:
        time.sleep(0.5)
    for f, (dim, name, leaves, do, d_state, want) in zip(ready, todo):
        got, again = f(leaves, do, d_state), f(leaves, do, d_state)
        same = all(bool(jnp.array_equal(got[n], again[n])) for n in leaves)
        say("float64:", dim, name, {n: rel(got[n], want[names[n]]) for n in leaves}, "same bits", same)

if __name__ == "__main__":
    say(jax.__version__, jax.devices()[0].device_kind)
    dict(cases=cases, times=times)[sys.argv[1]](sys.argv[2])
