"""Run by test_sharding.py on 8 simulated devices: prints as JSON what the tests there look at."""

import json
import logging
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from hybridlm import (
    ahead,
    init_from,
    layers,
    lent,
    loss,
    loss_blocks,
    member,
    model,
    program,
    scaled_matmul,
    schema,
    sharding,
)
from hybridlm import config as configs
from hybridlm.run.checkpoint import FORMAT, Checkpoints
from tests import tiny

MESHES = ((1, 1, 1), (2, 4, 1), (1, 4, 2))  # `data` alone: test_processes.py


def curves(folder: Path) -> dict:
    """Loss curves of one run on each mesh, each from the checkpoint that the mesh before it wrote."""
    config = tiny.config(tiny.write_text(folder))
    config.mixers.retnet.conv_size = 4
    config = configs.resolve(config)
    source = member.build_data(config, "train")
    result: dict = {"losses": {}, "restored": []}
    started = None
    for sizes in MESHES:
        mesh = sharding.make_mesh(schema.Mesh(*sizes))
        with jax.set_mesh(mesh), Checkpoints(folder / "checkpoints") as saves:
            built = program.build(config, model.build(config), mesh, source.token_bytes)
            apart, join, like = program.by_layer(model.build(config), built)
            step = saves.steps()[-1] if saves.steps() else None
            state = built.init(jax.random.key(0)) if step is None else join(saves.restore(step, like))
            host = jax.device_get(state)
            if started is not None:
                result["restored"].append(same(host, started))
            started = host
            embedding = state["params"]["embedding"]
            result.setdefault("embedding_shards", []).append(embedding.addressable_shards[0].data.shape)
            moments = [x for x in jax.tree.leaves(state["opt_state"]) if x.shape == embedding.shape]
            result.setdefault("moments_alike", []).append([x.sharding == embedding.sharding for x in moments])
            saves.save(len(result["restored"]) + 1, apart(state), {})
            losses = []
            for index in range(5):
                state, metrics = built.step(state, sharding.put_batch(source.batch(index), mesh))
                losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
            result["losses"][str(sizes)] = losses
    return result


def distilled(folder: Path) -> dict:
    """Loss, gradient norm and validation sums of a student of every term, its teacher on the same mesh."""
    text, teacher = tiny.write_text(folder), folder / "teacher"
    theirs = configs.resolve(tiny.config(text, model__pattern="full*2"))
    definition = model.build(theirs)
    params = model.unstack(definition, jax.jit(lambda key: model.init(definition, key))(jax.random.key(7)))
    with Checkpoints(teacher / "checkpoints") as saves:
        saves.save(1, {"params": params}, {"step": 1, "format": FORMAT})
    (teacher / "config.json").write_text(configs.to_json(theirs))
    student = tiny.config(text, model__pattern="featuremap full", optimizer__freeze=("layers.1.mlp.*",))
    sizes = {"num_heads": 4, "head_dim": 8, "v_head_dim": 8, "output_norm": False, "output_gate": "none"}
    student.mixers.featuremap = configs.mixer("feature_map", feature_map="hedgehog", **sizes)
    terms = {"kl": 1.0, "hidden": 0.5, "transfer": 0.5, "weights": 0.1, "next_token": 0.1, "temperature": 2.0}
    student.objective = configs.objective("distil", teacher=str(teacher), top_k=20, **terms)
    student.train.microbatches = 2
    student.init_from = str(teacher)
    config = configs.resolve(student)
    source, names = member.build_data(config, "train"), lent.names([config])
    result: dict = {}
    for sizes in (MESHES[0], MESHES[-1]):
        mesh = sharding.make_mesh(schema.Mesh(*sizes))
        with jax.set_mesh(mesh):
            built = program.build(config, model.build(config), mesh, source.token_bytes, lent=names)
            taught = init_from.teacher(config, built)
            state = built.init(jax.random.key(0))
            losses = []
            for index in range(3):
                batch = sharding.put_batch(source.batch(index), mesh)
                state, metrics = built.step(state, batch, *taught)
                losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
            sums = jax.device_get(built.evaluate(state["params"], batch, *taught))
        embedding = taught[0]["embedding"].addressable_shards[0].data.shape
        result[str(sizes)] = {"losses": losses, "sums": {n: float(x) for n, x in sums.items()}}
        result[str(sizes)]["embedding"] = embedding
    return result


def same(a: object, b: object) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def cumulative(q, gate, mask, state):
    """Something with the recurrence's axes: q [B, T, H, K], gate [B, T, H], mask [B, T], state [B, H, K]."""
    o = jnp.cumsum(q, axis=1) * gate[..., None] * mask[:, :, None, None]
    return (o, None) if state is None else (o + state[:, None], state * 2)


AXES = (("batch", None, "heads", None), ("batch", None, "heads"), ("batch", None), ("batch", "heads", None))


def shard_error(batch: int, heads: int, with_state: bool) -> float:
    """`per_shard` against the function itself: the largest error of the gradients of every input."""
    rng = np.random.default_rng(0)
    shapes = [(batch, 5, heads, 2), (batch, 5, heads), (batch, 5), (batch, heads, 2)]
    args = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    state_axes = AXES[3] if with_state else None
    wrapped = sharding.per_shard(cumulative, (*AXES[:3], state_axes), (AXES[0], state_axes))

    def gradients(fn, args):
        inputs = args if with_state else args[:3]
        value = lambda *a: sum(jnp.sum(jnp.sin(x)) for x in fn(*a, *[None] * (4 - len(a))) if x is not None)
        return jax.grad(value, tuple(range(len(inputs))))(*inputs)

    with jax.set_mesh(sharding.make_mesh(schema.Mesh(2, 2, 2))):
        got = jax.jit(lambda args: gradients(wrapped, args))(args)
    expected = gradients(cumulative, args)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(got, expected, strict=True))


def product_error() -> float:
    """Products in 8 bits cut over rows, parameters and heads against one device's: the largest error."""
    rng = np.random.default_rng(0)
    x, w, dy = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in ((8, 4, 32), (32, 16), (8, 4, 16)))

    def run(x, w, dy):
        cut = sharding.constrain(x, ("batch", None, None)), sharding.constrain(w, ("embed", "mlp"))
        y, back = jax.vjp(lambda x, w: scaled_matmul.scaled_matmul(x, w, ("embed", "mlp")), *cut)
        return y, *back(sharding.constrain(dy, ("batch", None, "mlp")))

    with jax.set_mesh(sharding.make_mesh(schema.Mesh(2, 2, 2))):
        got = jax.jit(run)(x, w, dy)
    expected = run(x, w, dy)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(got, expected, strict=True))


def shard_of(batch: int, heads: int) -> list[int]:
    """The shape that a device sees of an array [batch, heads]."""
    seen = []
    axes = (("batch", "heads"),)
    wrapped = sharding.per_shard(lambda x: (seen.append(x.shape), (x,))[1], axes, axes)
    with jax.set_mesh(sharding.make_mesh(schema.Mesh(2, 2, 2))):
        jax.eval_shape(wrapped, jnp.ones((batch, heads)))
    return list(seen[0])


def product_gradients() -> dict[str, object]:
    """Of `layers.product` in bfloat16 on a mesh: dtypes of its dot products by shape, and its largest error
    against the plain product in float32, for a kernel that is cut and one that is not."""
    rng = np.random.default_rng(0)
    x, kernel, weight = (
        jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((8, 4, 16), (16, 8), (8, 4, 8))
    )
    found: dict[str, object] = {}
    for axes in (("embed", "heads"), ("embed", None)):
        of = lambda x, kernel, axes=axes: jnp.sum(weight * layers.product(x, kernel, axes))
        plain = lambda x, kernel: jnp.sum(weight.astype(jnp.float32) * (x @ kernel))
        with jax.set_mesh(sharding.make_mesh(schema.Mesh(2, 2, 2))):
            gradient = jax.jit(jax.grad(of, (0, 1)))
            dots = re.findall(r"dot_general.*-> tensor<([\dx]+)x(\w+)>", gradient.lower(x, kernel).as_text())
            got = gradient(x, kernel)
        expected = jax.grad(plain, (0, 1))(x.astype(jnp.float32), kernel.astype(jnp.float32))
        errors = [jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)) for a, b in zip(got, expected, strict=True)]
        found[str(axes[1])] = {"dots": dict(dots), "error": float(max(errors))}
    return found


def loss_on_devices(blocks: bool) -> dict:
    """The chunked loss on a mesh of all axes: its largest error against one device, and how often the program
    gathers the head and scatters its gradient, within loops and outside."""
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((8, 16, 32), (32, 64)))
    targets = jnp.asarray(rng.integers(-1, 64, (8, 16)), jnp.int32)
    loss.CHUNK_ELEMENTS, loss.HEAD_REUSE, loss.MOST_ELEMENTS = 256, 0, 0 if blocks else 1 << 29
    loss_blocks.BLOCK_ELEMENTS, loss_blocks.LANES = 1, 8
    total = lambda hidden, head: loss.cross_entropy(hidden, head, targets, z_loss=0.1)[0]
    expected = jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, head)
    mesh = sharding.make_mesh(schema.Mesh(2, 2, 2))
    with jax.set_mesh(mesh):
        where = [
            NamedSharding(mesh, sharding.spec(axes, x.shape, mesh.shape))
            for axes, x in ((("batch", None, None), hidden), (("embed", "vocab"), head))
        ]
        run = jax.jit(
            jax.value_and_grad(total, (0, 1)), in_shardings=where, out_shardings=(None, tuple(where))
        )
        made = run.lower(hidden, head).compile()
        found = made(*jax.device_put((hidden, head), tuple(where)))
    error = lambda a, b: float(np.max(np.abs(a - np.asarray(b))) / np.max(np.abs(a)))
    computations, entry = ahead._computations(made.as_text())
    counts = {
        "error": max(jax.tree.leaves(jax.tree.map(error, jax.device_get(expected), jax.device_get(found))))
    }
    for name, lines in computations.items():
        for kind in ("all-gather", "reduce-scatter"):
            place = f"{kind} {'outside' if name == entry else 'inside'}"
            counts[place] = counts.get(place, 0) + sum(f" {kind}(" in line for line in lines)
    return counts


if __name__ == "__main__":
    logging.getLogger("hybridlm").setLevel(logging.ERROR)
    sizes = [(8, 4, True), (8, 3, True), (1, 4, False)]
    errors = {f"{batch},{heads}": shard_error(batch, heads, state) for batch, heads, state in sizes}
    shards = {f"{batch},{heads}": shard_of(batch, heads) for batch, heads, _ in sizes}
    results = curves(Path(sys.argv[1]))
    found = {"errors": errors, "shards": shards, **results, "product": product_gradients()}
    found["scaled product"] = product_error()
    (Path(sys.argv[1]) / "distil").mkdir()
    found["distilled"] = distilled(Path(sys.argv[1]) / "distil")
    found["loss"] = [loss_on_devices(blocks) for blocks in (False, True)]  # last, as it sets the chunks' size
    print(json.dumps(found))
