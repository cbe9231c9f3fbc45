"""The one-pass forward of KDA beside today's, on a GPU: right first, then kernel times. Temporary."""

import dataclasses
import functools
import sys

sys.path.insert(0, "tests")

import chunk_oracle
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_profile
from pallas_kernels.linear_attention.call import Call
from pallas_kernels.linear_attention.hopper import channel, inputs, one_pass, table, warm_up

table.LED = table.SHORT_WALKS = True


def draw(B, T, H, gates, seed=0):
    n = lambda i, *s: jax.random.normal(jax.random.key(seed + i), s)
    x = n(3, B, T, H, 128)
    g = -jnp.exp(x - 3) if gates == "slow" else -5 * jax.nn.sigmoid(x)
    bf = lambda x: x.astype(jnp.bfloat16)
    return Call(
        *[bf(n(i, B, T, H, 128)) for i in range(3)], log_decay=bf(g), beta=jax.nn.sigmoid(n(4, B, T, H)),
        initial_state=None, scale=128**-0.5, qk_l2norm=True, output_final_state=True,
    )  # fmt: skip


def one(call, runs, reach):
    i = inputs.prepare(call)
    lead = warm_up.leads(i, runs, reach)[0] if runs > 1 else None
    out = one_pass.OnePass(i, lead, pieces=runs, final=True)()
    return out.o, jnp.swapaxes(out.final[runs - 1 :: runs], 2, 3), out.first_wrong


def today(call):
    out, _ = channel.channel_forward(inputs.prepare(call), final=True, keep=False)
    return out.o, jnp.swapaxes(out.final, 2, 3)


def right():
    error = lambda got, want: float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))
    for gates, runs, l2norm in [("slow", 1, True), ("steep", 1, False), ("steep", 4, True)]:
        call = draw(2, 1024, 2, gates)
        if not l2norm:
            call = dataclasses.replace(call, qk_l2norm=False, k=(call.k * 128**-0.5).astype(jnp.bfloat16))
        if runs == 1:
            call = dataclasses.replace(call, initial_state=jax.random.normal(jax.random.key(9), (2, 2, 128, 128)))
        state = jnp.zeros((2, 2, 128, 128)) if call.initial_state is None else call.initial_state
        given = {f.name: getattr(call, f.name) for f in dataclasses.fields(Call)}
        for name in ("output_final_state", "interpret", "axis", "continues"):
            del given[name]
        o, final, *_ = chunk_oracle.linear_attention_vjp(
            **given | dict(initial_state=state), do=np.zeros(call.v.shape), d_final_state=np.zeros(state.shape)
        )
        run = jax.jit(functools.partial(one, runs=runs, reach=2))
        got, again, now = run(call), run(call), jax.jit(today)(call)
        same = jax.tree.all(jax.tree.map(jnp.array_equal, got, again))
        print(
            gates, runs, l2norm, "one pass: o", error(got[0], o), "state", error(got[1], final), "same bits", same,
            "first", float(got[2].min()), "| today: o", error(now[0], o), "state", error(now[1], final), flush=True,
        )  # fmt: skip


def times(shapes):
    for B, T, H, runs, reach in shapes:
        new = jax.jit(functools.partial(one, runs=runs, reach=reach))
        old = jax.jit(today)
        for gates in ("steep", "slow"):
            call = draw(B, T, H, gates)
            for name, run in (("today", old), ("one pass", new)):
                if gates == "slow" and runs > 1 and name == "one pass":
                    continue  # walks everything
                jax.block_until_ready(run(call))
                rows = gpu_profile.kernels(lambda run=run, call=call: [run(call) for _ in range(10)])
                print(B, T, H, gates, runs, name, f"{sum(ms for *_, ms in rows) / 10:.4f} ms", flush=True)
                for kernel, count, ms in rows[:4]:
                    print(f"    {ms / 10:.4f} {count:4d} {kernel[:70]}", flush=True)


if __name__ == "__main__":
    right()
    if "times" in sys.argv:
        times([(1, 65536, 8, 16, 2), (1, 8192, 32, 4, 2), (1, 2048, 12, 8, 2), (8, 4096, 16, 1, 2)])
