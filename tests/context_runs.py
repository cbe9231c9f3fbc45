"""Run by test_context_mesh.py on 8 simulated devices: prints as JSON what the tests there look at.

python -m tests.context_runs ops | steps FOLDER
"""

import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridlm import ahead, generate, loss, mixers, model, program, schema, sharding
from hybridlm import config as configs
from hybridlm.context import Context
from hybridlm.layers import ShortConv, convolve, elementwise
from hybridlm.linear_mixer import Inputs, recurrence
from hybridlm.mixers import s4d
from hybridlm.mixers.mamba import selective_scan
from hybridlm.mixers.mlstm import Config as MLSTM
from hybridlm.mixers.mlstm import mlstm
from hybridlm.rows import Rows
from hybridlm.run.checkpoint import Checkpoints
from hybridlm.softmax_attention import attend, imbalance
from tests import tiny

SEQ_LEN, HEADS = 32, {"num_heads": 4, "head_dim": 4}
LATENT = {"num_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
# Documents that end on a border of four pieces, lie over several, are shorter than a halo; padding.
DOCUMENTS = ([8, 3, 18], [3, 2, 20, 7], [32], [15, 2, 9])


def packed() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids, positions = np.zeros((2, len(DOCUMENTS), SEQ_LEN), np.int32)
    for row, sizes in enumerate(DOCUMENTS):
        at = 0
        for number, size in enumerate(sizes, 1):
            ids[row, at : at + size], positions[row, at : at + size] = number, np.arange(size)
            at += size
    tokens, targets = rng.integers(1, 250, size=(2, *ids.shape), dtype=np.int32)
    targets = np.where((ids == 0) | (rng.random(ids.shape) < 0.1), -1, targets)
    return {"tokens": tokens, "targets": targets, "segment_ids": ids, "positions": positions}


def cases() -> dict[str, tuple[Callable, tuple]]:
    """Every part that a cut sequence concerns, as a function of its differentiable arguments."""
    batch = {name: jnp.asarray(array[:2]) for name, array in packed().items()}
    rows = Rows(batch["segment_ids"], batch["positions"])
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(2, SEQ_LEN, *shape)), jnp.float32)
    near, wide = (ShortConv(4, width, rngs=nnx.Rngs(0)) for width in (4, 12))
    # mLSTM divides by n . q: where that nearly cancels, gradients turn on the last bit of the inputs.
    qkv, group = (normal(2, 4), normal(2, 4), normal(2, 4)), (normal(2, 4), normal(1, 4), normal(1, 4))
    zeros = lambda *shape: jnp.zeros((2, *shape))

    def linear(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, *beta: jax.Array) -> jax.Array:
        inputs = Inputs(q, k, v, -jax.nn.softplus(g), *map(jax.nn.sigmoid, beta))
        return recurrence(inputs, rows, qk_l2norm=True)[0]

    def normalised(q: jax.Array, k: jax.Array, v: jax.Array, f: jax.Array, i: jax.Array) -> jax.Array:
        return mlstm(Inputs(q, k, v, jax.nn.log_sigmoid(f), i), rows, None, MLSTM(kind="mlstm"))[0]

    def scan(x: jax.Array, dt: jax.Array, B: jax.Array, C: jax.Array) -> jax.Array:
        A_log = jnp.log(jnp.arange(1.0, 9).reshape(4, 2))
        return selective_scan(x, jax.nn.softplus(dt), A_log, B, C, rows, zeros(4, 2))[0]

    def forgetting(window: int) -> Callable:
        extras = lambda f: {"sinks": jnp.arange(2.0), "log_forget": jax.nn.log_sigmoid(f)}
        return lambda q, k, v, f: attend(q, k, v, rows, scale=0.5, window=window, **extras(f))

    def turning(u: jax.Array, dt: jax.Array) -> jax.Array:
        ones, C = jnp.ones((4, 2)), jnp.stack([jnp.ones((4, 2))] * 2, axis=-1)
        return s4d.scan(u, s4d.System(dt[0, 0] - 3, -ones, ones * jnp.arange(2), C), rows, zeros(4, 2, 2))[0]

    def over(kind: str, **settings: object) -> Callable:
        known = {"part": mixers.config_class("gated_delta_net")(kind="gated_delta_net", **HEADS)}
        config = mixers.config_class(kind)(kind=kind, of="part", **settings).joined(known)
        layer = mixers.load(kind)(config, mixers.Site(8), rngs=nnx.Rngs(params=0))
        return lambda x: layer(x, Context(rows))[0]

    head = jnp.asarray(rng.normal(size=(4, 250)), jnp.float32)
    return {
        "delta rule": (linear, (*qkv, normal(2, 4), normal(2))),
        "additive": (linear, (*qkv, normal(2))),
        "element-wise": (
            lambda x, g: elementwise(x, -jax.nn.softplus(g), rows, zeros(4))[0],
            (normal(4),) * 2,
        ),
        "convolution": (lambda x: convolve([near], [x], rows, None, silu=True)[0][0], (normal(4),)),
        "convolution over two borders": (lambda x: wide(x, rows)[0], (normal(4),)),
        "attention": (lambda *a: attend(*a, rows, scale=0.5), group),
        "attention with sinks": (
            lambda q, k, v, s: attend(q, k, v, rows, scale=0.5, sinks=s[0, 0]),
            (*group, normal(2)),
        ),
        "window": (lambda *a: attend(*a, rows, scale=0.5, window=6), group),
        "window over several pieces": (lambda *a: attend(*a, rows, scale=0.5, window=20), group),
        "sink tokens": (lambda *a: attend(*a, rows, scale=0.5, window=6, sink_tokens=3), group),
        "sinks, forget gates": (forgetting(0), (*group, normal(2))),
        "sinks, forget gates, window": (forgetting(6), (*group, normal(2))),
        "mlstm": (normalised, (*map(jnp.abs, qkv), normal(2) + 2, normal(2))),
        "mamba": (scan, (normal(4), normal(4), normal(2), normal(2))),
        "s4d": (turning, (normal(4), normal(4))),
        "log-linear": (over("log_linear"), (normal(8),)),
        "memories": (over("mom"), (normal(8),)),
        "partitions": (over("sse"), (normal(8),)),
        "loss": (lambda h: 0.01 * loss.cross_entropy(h, head, batch["targets"], z_loss=0.1)[0], (normal(4),)),
    }


def errors() -> dict[str, float]:
    """The largest error of results and gradients on four devices against one, over their largest value."""
    mesh, found = sharding.make_mesh(schema.Mesh(1, 1, 1, 4)), {}
    for name, (function, args) in cases().items():

        def results(*args: jax.Array, function: Callable = function) -> tuple:
            o, pull = jax.vjp(function, *args)
            return o, pull(jnp.cos(o))

        one = jax.jit(lambda *args, results=results: results(*args))(*args)
        with jax.set_mesh(mesh):
            cut = jax.jit(lambda *args, results=results: results(*args))(*args)
        error = lambda a, b: float(np.max(np.abs(a - np.asarray(b))) / np.max(np.abs(a)))
        found[name] = max(jax.tree.leaves(jax.tree.map(error, jax.device_get(one), jax.device_get(cut))))
    return found


def config(remat: str, **train: object) -> configs.Config:
    c = tiny.config("unused", model__remat=remat)
    c.mixers = {
        "kda": configs.mixer("kda", **HEADS),
        "mla": configs.mixer("mla", **LATENT),
        "product": configs.mixer("delta_product", **HEADS),
    }
    c.mlps = {"moe": configs.mlp("moe", num_experts=4, top_k=2, hidden=8, balance_loss=0.0)}
    c.model.update(pattern="kda*2 mla/moe product", num_layers=0)
    c.train.update(batch_size=len(DOCUMENTS), seq_len=SEQ_LEN, **train)
    return configs.resolve(c)


RUNS = {  # sizes, microbatches, what is kept
    "one": ((1, 1, 1, 1), 1, "full"),
    "fsdp 2, tensor 2, context 2": ((1, 2, 2, 2), 2, "attention"),
}


def steps() -> dict:
    """Loss, accuracy and gradient norms of two steps of a stack on each mesh, each from what the mesh before
    had as its parameters at the start, by layer, as a checkpoint has them."""
    found: dict = {}
    start = None
    for name, (sizes, microbatches, remat) in RUNS.items():
        one, mesh = config(remat, microbatches=microbatches), sharding.make_mesh(schema.Mesh(*sizes))
        definition = model.build(one)
        with jax.set_mesh(mesh):
            built = program.build(one, definition, mesh, None)
            apart, join, like = program.by_layer(definition, built)
            if start is None:
                state = built.init(jax.random.key(0))
            else:
                state = join(jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), start, like))
            start = jax.device_get(apart(state))
            kept = []
            for _ in range(2):
                state, metrics = built.step(state, sharding.put_batch(packed(), mesh))
                norms = {n: np.sqrt(x).ravel().tolist() for n, x in metrics.pop("squared_norms").items()}
                kept.append({"norms": norms, **{n: float(x) for n, x in metrics.items()}})
            found[name] = kept
    return found


RESUMED = (2, 4, 1)  # devices of `context`


def resumed() -> dict:
    """Losses of six steps of a small stack on one device; and of two on each of `RESUMED`, each from the
    checkpoint that the mesh before wrote."""
    c = tiny.config("unused", model__pattern="gdn full")
    c.mixers.gdn = configs.mixer("gated_delta_net", **HEADS)
    c.train.update(batch_size=len(DOCUMENTS), seq_len=SEQ_LEN)
    one = configs.resolve(c)
    definition = model.build(one)

    def run(context: int, saves: Checkpoints | None, steps: int) -> list[float]:
        mesh = sharding.make_mesh(schema.Mesh(1, 1, 1, context))
        with jax.set_mesh(mesh):
            built = program.build(one, definition, mesh, None)
            apart, join, like = program.by_layer(definition, built)
            done = saves.steps()[-1:] if saves else []
            state = join(saves.restore(done[0], like)) if saves and done else built.init(jax.random.key(0))
            batch, losses = sharding.put_batch(packed(), mesh), []
            for _ in range(steps):
                state, metrics = built.step(state, batch)
                losses.append(float(metrics["loss"]))
            if saves:
                saves.save(sum(done) + steps, apart(state), {})
                saves.wait()
        return losses

    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder)) as saves:
        parts = [loss for context in RESUMED for loss in run(context, saves, 2)]
    return {"whole": run(1, None, 6), "resumed": parts}


STEPS, CHUNK = 5, 4  # tokens written; tokens of a prompt at once, on each device


def decoding() -> dict:
    """Of caches on each mesh: logits [1 + STEPS, rows, V] of a prefill in chunks, packed rows among them,
    and of greedy steps behind it, their tokens, and arrays as long as a cache."""
    c = tiny.config("unused", model__pattern="kda mla:c full swa mla@c", model__num_layers=0)
    softmax = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    kinds = {"full": {"sinks": True, "forget_gate": True}, "swa": {"window": 6}}
    c.mixers = {name: configs.mixer("attention", **softmax, **more) for name, more in kinds.items()} | {
        "kda": configs.mixer("kda", **HEADS), "mla": configs.mixer("mla", **LATENT),
    }  # fmt: skip
    definition = model.build(configs.resolve(c))
    params = jax.jit(partial(model.init, definition))(jax.random.key(0))
    params = {name: x * 4 if x.ndim > 3 else x for name, x in params.items()}  # or every token is alike
    batch = packed()
    prompts = generate.left_pad([[1] * SEQ_LEN, [1] * 9], SEQ_LEN)[1]
    packs = Rows(batch["segment_ids"][1:3], batch["positions"][1:3])
    rows = jax.tree.map(lambda *x: jnp.concatenate(x), packs, prompts)

    @jax.jit
    def run(params: model.Params, tokens: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
        lm = model.merge(definition, params)
        hidden, cache = generate.prefill(lm, tokens, rows, lm.init_cache(len(tokens), SEQ_LEN + STEPS + 3))
        head, blocks = lm.head_matrix(), lm.unstacked()

        def step(carry: tuple, _: None) -> tuple[tuple, tuple]:
            hidden, position, cache = carry
            logits = hidden @ head
            token = jnp.argmax(logits, axis=-1)
            hidden, cache = lm.step(token, Rows(jnp.ones_like(position), position), cache, blocks)
            return (hidden, position + 1, cache), (logits, token)

        first = hidden, rows.positions[:, -1] + 1, cache
        return jax.lax.scan(step, first, length=STEPS + 1)[1]

    found: dict = {}
    generate.decoding.PREFILL_CHUNK = CHUNK
    for tensor, context in ((1, 1), (2, 4)):
        with jax.set_mesh(sharding.make_mesh(schema.Mesh(1, 1, tensor, context))):
            compiled = run.lower(params, batch["tokens"], rows).compile()
            logits, tokens = compiled(params, batch["tokens"], rows)
            slots = -(-(SEQ_LEN + STEPS + 3) // context) * context
            long = set(re.findall(rf"\w+\[(?:\d+,)*{slots}(?:,\d+)*\]", compiled.as_text()))
            found[context] = {"logits": logits.tolist(), "tokens": tokens.tolist(), "long": sorted(long)}
    return found


def facts() -> dict:
    """The imbalance of one document over four, and bytes that a known program sends."""
    mesh = sharding.make_mesh(schema.Mesh(1, 1, 1, 4))
    positions = jnp.arange(1 << 14)[None]
    with jax.set_mesh(mesh):
        uneven = {"one document": imbalance(positions, (0,)), "window": imbalance(positions, (2,))}
        short = jnp.where(positions < 1 << 12, positions, 0)  # the first quarter of a row, then single tokens
        uneven["a quarter"] = imbalance(short, (0,))
    spread = jax.P(None, "context")

    def loop(x: jax.Array) -> jax.Array:
        add = lambda total, _: (total + jax.lax.all_gather(x * total.sum(), "context").sum(0), None)
        return jax.lax.scan(add, x, None, length=5)[0]

    run = jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False))
    text = run.lower(jnp.ones((8, 64))).compile().as_text()
    return {name: float(x) for name, x in uneven.items()} | {"sent": ahead.sent(text)}


def whole() -> list[str]:
    """Arrays as long as the row in what attention and the loss compile to on four devices, with gradients."""
    mesh, length = sharding.make_mesh(schema.Mesh(1, 1, 1, 4)), 8 * 67
    cut = jax.NamedSharding(mesh, jax.P(None, "context"))
    struct = lambda dtype, *shape: jax.ShapeDtypeStruct((1, length, *shape), dtype, sharding=cut)
    x, ids, head = struct(jnp.float32, 2, 4), struct(jnp.int32), jnp.ones((8, 250))

    def total(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        o = attend(q, k, v, Rows(ids, ids), scale=0.5)
        return loss.cross_entropy(o.reshape(1, length, 8), head, ids)[0]

    with jax.set_mesh(mesh):
        run = jax.jit(jax.grad(total, (0, 1, 2)), out_shardings=cut).lower(x, x, x, ids).compile()
    return sorted(set(re.findall(rf"\w+\[(?:\d+,)*{length}(?:,\d+)*\]", run.as_text())))


if __name__ == "__main__":
    logging.getLogger("hybridlm").setLevel(logging.ERROR)
    jax.config.update("jax_default_matmul_precision", "highest")
    print(json.dumps({part: globals()[part]() for part in sys.argv[1:]}))
