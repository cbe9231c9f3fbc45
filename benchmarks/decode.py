"""Decode speed and memory against context length: full attention beside hybrids, in one run.

    python -m benchmarks.decode --contexts=1024,4096,16384,65536,262144
    python -m benchmarks.decode --stacks="full; kda*3 mla; full:a full@a" --contexts=32768 --bytes
    python -m benchmarks.decode --stacks="mla; kda*3 mla; full" --contexts=131072,1048576 --layers=4
    python -m benchmarks.decode --stacks="mla; full" --contexts=1048576 --layers=1 --devices=h100:4

A stack is a pattern of full, gqa (a quarter of the key heads), swa (a window of 1024), mla, kda and gdn,
filled to --layers layers. --bytes says what is kept and runs nothing, so that it needs no accelerator, and
--devices what a step takes on GPUs that are not there (docs/long.md). --context: devices that share caches.
Caches have the size that a prompt of that length leaves, filled with random numbers in place of a prompt's,
and --steps tokens are decoded from there, greedily, in one compiled loop, its layers unrolled. Layers are of
d_model 2048 in bfloat16. --output is written as soon as a context is measured.
"""

import argparse
import functools
import itertools
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import ahead, schema, sharding
from hybridlm import config as configs
from hybridlm import model as lm
from hybridlm.rows import Rows
from hybridlm.token_cache import TokenCache
from pallas_kernels import H100, auto_means, compiled_for

RUNS = 3  # of which the fastest counts


def definition(pattern: str, layers: int, d_model: int) -> lm.Definition:
    """``pattern`` filled to so many layers of 4 d_model^2 to 6 d_model^2 parameters each."""
    config = configs.default()
    config.mixers.full.update(num_heads=d_model // 64, head_dim=64)
    config.mixers.gqa = configs.mixer("attention", num_heads=d_model // 64, num_kv_heads=d_model // 256)
    config.mixers.swa.update(num_heads=d_model // 64, head_dim=64, window=1024)
    config.mixers.mla.update(num_heads=d_model // 128, rope_theta=0.0)
    config.mixers.kda.update(num_heads=d_model // 128, head_dim=128)
    config.mixers.gdn.update(num_heads=3 * d_model // 512, head_dim=128, v_head_dim=256)
    config.model.update(pattern=pattern, num_layers=layers, d_model=d_model, vocab_size=32_000)
    config.model.update(mlp_hidden=d_model // 48 * 128, tie_embeddings=True, remat="none")
    config.data.path = "python-stdlib:"  # never opened
    return lm.build(configs.resolve(config))


@functools.partial(jax.jit, static_argnames=("definition", "steps"), donate_argnames="cache")
def decode(
    params: lm.Params,
    cache: lm.Cache,
    token_B: jax.Array,
    start: jax.Array,
    *,
    definition: lm.Definition,
    steps: int,
) -> tuple[jax.Array, lm.Cache]:
    model = lm.merge(definition, params)
    blocks, head = model.unstacked(), model.head_matrix().astype(definition.dtype)

    def step(i: jax.Array, carry: tuple[jax.Array, lm.Cache]) -> tuple[jax.Array, lm.Cache]:
        token, cache = carry
        position = jnp.full_like(token, start + i)
        hidden, cache = model.step(token, Rows(jnp.ones_like(token), position), cache, blocks)
        return jnp.argmax(hidden @ head, axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, steps, step, (token_B, cache))


def cache_shapes(definition: lm.Definition, batch: int, size: int) -> Any:
    """Shapes and dtypes of the caches of ``batch`` rows of at most ``size`` tokens."""
    init = lambda params: lm.merge(definition, params).init_cache(batch, size)
    return jax.eval_shape(init, shapes(definition))


def noise(like: Any) -> jax.Array:
    """Random numbers of this shape, the same every 1024 along the second axis: no temporary is as large."""
    if not like.ndim:
        return jnp.zeros((), like.dtype)
    batch, size, *rest = like.shape
    few = jax.random.normal(jax.random.key(0), (batch, min(size, 1024), *rest), like.dtype)
    whole = jnp.take(few, jnp.arange(size) % few.shape[1], axis=1, mode="clip")
    return whole if like.sharding is None else jax.device_put(whole, like.sharding)


def is_tokens(leaf: Any) -> bool:
    return isinstance(leaf, TokenCache)


def filled(shapes: Any, context: int) -> lm.Cache:
    """Caches of these shapes, of random numbers, that hold ``context`` tokens."""
    caches = jax.tree.map(noise, shapes)
    set_length = lambda leaf: leaf._replace(length=jnp.int32(context)) if is_tokens(leaf) else leaf
    return jax.tree.map(set_length, caches, is_leaf=is_tokens)


class Decoder(NamedTuple):
    """cache: shapes and dtypes.  run: (params, cache, token, start) -> (token, cache), the loop compiled."""

    cache: Any
    run: Any

    @property
    def whole(self) -> Any:
        """Where what is not cut lies; None on one device."""
        mesh = jax.sharding.get_mesh()
        return None if mesh.empty else jax.NamedSharding(mesh, jax.P())


def shapes(definition: lm.Definition) -> Any:
    """Shapes of the parameters, in the dtype of the activations as for serving."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, definition.dtype), lm.shapes(definition))


def placed(shapes: Any) -> Any:
    """``shapes`` with where they lie on the mesh in context: tokens of caches cut over it, all else whole."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return shapes

    def place(path: tuple, x: Any) -> Any:
        tokens = any(getattr(key, "name", "") == "tokens" for key in path)
        axes = ("batch", "time", *[None] * (x.ndim - 2)) if tokens else (None,) * x.ndim
        where = jax.NamedSharding(mesh, sharding.spec(axes, x.shape, mesh.shape))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(place, shapes)


def compiled(
    definition: lm.Definition, context: int, batch: int, steps: int, platforms: tuple[str, ...] | None = None
) -> Decoder:
    """A loop of ``steps`` steps from ``context`` tokens; nothing is allocated."""
    cache = placed(cache_shapes(definition, batch, context + steps))
    scalars = placed((jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)))
    run = decode.trace(placed(shapes(definition)), cache, *scalars, definition=definition, steps=steps)
    return Decoder(cache, run.lower(lowering_platforms=platforms).compile())


def kept(cache: Any, context: int, batch: int) -> tuple[int, int]:
    """(bytes of keys, values and latents, bytes of recurrent state) of a sequence of ``context`` tokens."""
    tokens = state = 0
    for layer in jax.tree.leaves(cache, is_leaf=is_tokens):
        held = is_tokens(layer)
        for leaf in jax.tree.leaves(layer.tokens if held else layer):
            size = math.prod(leaf.shape) * leaf.dtype.itemsize // batch
            tokens += size // leaf.shape[1] * min(context, leaf.shape[1]) if held else 0
            state += 0 if held else size
    return tokens, state


def measure(decoder: Decoder, params: lm.Params, context: int, batch: int, steps: int) -> dict[str, Any]:
    """Milliseconds a token, and bytes of KV cache and of recurrent state a sequence."""
    token, start = jax.device_put((jnp.zeros(batch, jnp.int32), jnp.int32(context)), decoder.whole)
    seconds = []
    for _ in range(1 + RUNS):  # the first warms up
        cache = jax.block_until_ready(filled(decoder.cache, context))
        began = time.perf_counter()
        _, cache = jax.block_until_ready(decoder.run(params, cache, token, start))
        seconds.append(time.perf_counter() - began)
        del cache  # before there is another
    kv_bytes, state_bytes = kept(decoder.cache, context + steps, batch)
    return {"ms": 1e3 * min(seconds[1:]) / steps, "kv_bytes": kv_bytes, "state_bytes": state_bytes}


def print_bytes(built: dict[str, lm.Definition], contexts: list[int]) -> None:
    """A table of what a sequence keeps, of the caches' shapes."""
    print(
        "| stack | layers | "
        + " | ".join(f"{context:,}: KV, MiB | state, MiB" for context in contexts)
        + " |"
    )
    print("|---" * (2 + 2 * len(contexts)) + "|")
    for name, one in built.items():
        sizes = [kept(cache_shapes(one, 1, context), context, 1) for context in contexts]
        cells = [f"{size / 2**20:,.1f}" for pair in sizes for size in pair]
        print(f"| `{name}` | {len(one.layers)} | " + " | ".join(cells) + " |")


def print_needs(
    built: dict[str, lm.Definition], contexts: list[int], batch: int, steps: int, devices: str
) -> None:
    """What one of ``devices``, which need not be there, holds and sends in a step."""
    mesh = sharding.make_mesh(schema.Mesh(1, 1, 1, ahead.parse(devices)), ahead.absent(devices))
    for context, (name, one) in itertools.product(contexts, built.items()):
        with jax.set_mesh(mesh), compiled_for(H100), auto_means("hopper", "xla"):
            run = compiled(one, context, batch, steps, ("cuda",)).run
        found = run.memory_analysis()
        sizes = found.alias_size_in_bytes, found.argument_size_in_bytes, found.temp_size_in_bytes
        kept, held, temporary = (f"{size / 2**20:,.0f} MiB" for size in sizes)
        sent = sum(ahead.sent(run.as_text()).values()) / steps
        print(f"{context:,} tokens, {name}: caches {kept}, with parameters {held}, temporaries {temporary}; "
              f"a step sends {sent:,.0f} bytes", flush=True)  # fmt: skip


def time_all(built: dict[str, lm.Definition], contexts: list[int], flags: argparse.Namespace) -> None:
    """Prints and writes what each stack takes at each context."""
    stacks = list(built)
    print(f"{jax.devices()[0].device_kind}: batch {flags.batch}, {flags.layers} layers")
    cases = [(context, stack) for context in contexts for stack in stacks]
    began = time.perf_counter()

    def prepare(case: tuple[int, str]) -> Decoder:
        with sharding.sequences_over(flags.context):  # a mesh is its thread's
            return compiled(built[case[1]], case[0], flags.batch, flags.steps)

    with ThreadPoolExecutor(flags.threads) as pool:
        decoders = dict(zip(cases, pool.map(prepare, cases), strict=True))
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    results = []
    # A step takes the same time whatever they are.
    constant = lambda x: jnp.full(x.shape, 1e-2, x.dtype, device=x.sharding)
    params = {stack: jax.tree.map(constant, placed(shapes(built[stack]))) for stack in stacks}
    for context in contexts:
        row: dict[str, Any] = {"context": context}
        for stack in stacks:
            row[stack] = measure(decoders[context, stack], params[stack], context, flags.batch, flags.steps)
        results.append(row)
        Path(flags.output).write_text(json.dumps(results, indent=1))
        base = next(iter(row[name]["ms"] for name in row if name != "context"))
        shown = [
            f"{name}: {r['ms']:.3f} ms ({base / r['ms']:.2f}x), {1e3 * flags.batch / r['ms']:,.0f} tokens/s, "
            f"KV {r['kv_bytes'] / 2**20:,.1f} MiB, state {r['state_bytes'] / 2**20:.1f} MiB"
            for name, r in row.items()
            if name != "context"
        ]
        print(f"{context:>7,} tokens | " + " | ".join(shown), flush=True)
    last = results[-1]
    speedups = np.array([last[stacks[0]]["ms"] / last[stack]["ms"] for stack in stacks])
    print(f"at {last['context']:,} tokens the others are {speedups[1:].round(2).tolist()} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", default="1024,4096,16384,65536,262144")
    parser.add_argument("--stacks", default="full; gdn*3 full; gdn*7 full", help="patterns, the base first")
    parser.add_argument("--bytes", action="store_true", help="print what is kept, and stop")
    parser.add_argument("--devices", help="h100:N: compile for those and stop")
    parser.add_argument("--context", type=int, default=1, help="devices that share caches")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--d_model", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--threads", type=int, default=8, help="that compile")
    parser.add_argument("--output", default="decode.json")
    flags = parser.parse_args()
    stacks = [stack.strip() for stack in flags.stacks.split(";")]
    contexts = [int(context) for context in flags.contexts.split(",")]
    built = {stack: definition(stack, flags.layers, flags.d_model) for stack in stacks}
    if flags.bytes:
        print_bytes(built, contexts)
    elif flags.devices:
        print_needs(built, contexts, flags.batch, flags.steps, flags.devices)
    else:
        with sharding.sequences_over(flags.context):
            time_all(built, contexts, flags)


if __name__ == "__main__":
    main()
