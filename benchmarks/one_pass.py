"""The one-pass forward of KDA beside today's, on a GPU: right first, then kernel times. Temporary."""

import dataclasses
import functools
import sys
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, "tests")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_profile
from benchmarks.peers import median_ms
from pallas_kernels.linear_attention.call import Call
from pallas_kernels.linear_attention.hopper import channel, inputs, one_pass, one_pass_forward, table
from pallas_kernels.linear_attention.hopper.forward_scan import Scanned

table.LED = table.SHORT_WALKS = True
START = time.time()


def say(*what):
    print(f"{time.time() - START:5.0f}s", *what, flush=True)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def draw_both(B, T, H):
    x = jax.random.normal(jax.random.key(0), (4, B, T, H, 128))
    beta = jax.nn.sigmoid(jax.random.normal(jax.random.key(1), (B, T, H)))
    q, k, v, _ = x.astype(jnp.bfloat16)
    gates = dict(slow=-jnp.exp(x[3] - 3), steep=-5 * jax.nn.sigmoid(x[3]))
    return {
        name: Call(
            q, k, v, log_decay=g.astype(jnp.bfloat16), beta=beta, initial_state=None, scale=128**-0.5,
            qk_l2norm=True, output_final_state=True,
        )
        for name, g in gates.items()
    }  # fmt: skip


def draw(B, T, H, gates):
    return draw_both(B, T, H)[gates]


def one(call, choice=None):
    """Without what computes again where a token is wrong."""
    state = lambda: jnp.zeros((call.q.shape[0], call.q.shape[2], 128, 128))
    nothing = lambda: Scanned(o=jnp.zeros_like(call.v), final=state())
    out = one_pass_forward.one_pass_forward(
        inputs.prepare(call), final=True, otherwise=nothing, choice=choice
    )
    return out.o, jnp.swapaxes(out.final, 2, 3)


def today(call, choice=None):
    out, _ = channel.channel_forward(inputs.prepare(call), final=True, keep=False, choice=choice)
    return out.o, jnp.swapaxes(out.final, 2, 3)


def part(call, without):
    """Times of one role alone; results are wrong."""

    class Part(one_pass.OnePass):
        pass

    if without == "prepare":
        Part.prepare_tile = lambda self, at, slot: (
            one_pass.blocks.row_vector(at.smem.vectors.at[slot, 0]) > 2.0
        )
    else:
        Part.advance = lambda self, at, wg, slot, chunk, state, output: state
    return Part(inputs.prepare(call), final=False)().o


Choice = table.Choice
RIGHT = [
    ("slow, initial state", draw, (2, 1024, 2, "slow"), Choice(128), dict(state=True)),
    ("steep, keys as they are", draw, (2, 1024, 2, "steep"), Choice(128), dict(l2norm=False)),
    ("steep, led", draw, (2, 1024, 2, "steep"), Choice(128, led=4), {}),
    ("slow, pieces", draw, (2, 1024, 2, "slow"), Choice(128, 4), dict(state=True)),
]
SHAPES = [(1, 65536, 8), (1, 8192, 32), (1, 2048, 12), (8, 4096, 16)]


def case(how, arguments, state=False, l2norm=True):
    call = how(*arguments)
    if not l2norm:
        call = dataclasses.replace(call, qk_l2norm=False, k=(call.k / 12).astype(jnp.bfloat16))
    if state:
        call = dataclasses.replace(call, initial_state=jax.random.normal(jax.random.key(9), (2, 2, 128, 128)))
    return call


def expected(call):
    given = {
        f.name: np.asarray(getattr(call, f.name))
        for f in dataclasses.fields(Call)
        if f.name in ("q", "k", "v")
    }
    to_64 = lambda x: np.asarray(x, np.float64)
    S = np.zeros((2, 2, 128, 128)) if call.initial_state is None else to_64(call.initial_state)
    q, k, v = (to_64(given[name]) for name in "qkv")
    if call.qk_l2norm:
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    g, beta, out = np.exp(to_64(call.log_decay)), to_64(call.beta), []
    for t in range(q.shape[1]):
        S = S * g[:, t, :, :, None]
        r = beta[:, t, :, None] * (v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], S))
        S = S + k[:, t, :, :, None] * r[:, :, None]
        out.append(np.einsum("bhk,bhkv->bhv", q[:, t], S) * call.scale)
    return np.stack(out, 1), S


def main():
    error = lambda got, want: float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))
    cases = [(name, case(how, arguments, **more), choice) for name, how, arguments, choice, more in RIGHT]
    compiled = lambda run, call: jax.jit(run).lower(call).compile()
    calls = {(shape, gates): draw(*shape, gates) for shape in SHAPES for gates in ("steep", "slow")}
    say("drawn")
    with ThreadPoolExecutor(16) as pool:
        rights = [
            pool.submit(compiled, functools.partial(one, choice=choice), call) for _, call, choice in cases
        ]
        jobs = {
            (shape, name): pool.submit(compiled, run, calls[shape, "steep"])
            for name, run in (("one pass", one), ("today", today))
            for shape in SHAPES
        }
        for without in ("prepare", "state"):
            run = functools.partial(part, without=without)
            jobs[SHAPES[3], "without " + without] = pool.submit(compiled, run, calls[SHAPES[3], "steep"])
        wants = [expected(call) for _, call, _ in cases]
        say("expected")
        for (name, call, _), job, want in zip(cases, rights, wants, strict=True):
            run = job.result()
            got, again = run(call), run(call)
            same = jax.tree.all(jax.tree.map(jnp.array_equal, got, again))
            say(name, "| o", error(got[0], want[0]), "state", error(got[1], want[1]), "same bits", same)
        [job.result() for job in jobs.values()]  # to be alone
    say("compiled")
    for (shape, name), job in jobs.items():
        run = job.result()
        for gates in ("steep", "slow"):
            call = calls[shape, gates]
            wall = median_ms(lambda run=run, call=call: run(call), jax.block_until_ready, groups=3)
            rows = gpu_profile.kernels(lambda run=run, call=call: [run(call) for _ in range(5)])
            say(*shape, gates, name, f"{sum(ms for *_, ms in rows) / 5:.4f} ms, wall {wall:.4f}")
            for kernel, count, ms in rows[:5]:
                print(f"            {ms / 5:.4f} {count:4d} {kernel[:70]}", flush=True)


if __name__ == "__main__":
    main()
