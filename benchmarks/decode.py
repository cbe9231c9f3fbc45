"""Decode speed and memory against context length: full attention beside hybrids, in one run.

    python -m benchmarks.decode --contexts=1024,4096,16384,65536,262144

Caches have the size that a prompt of that length leaves, filled with zeros, and --steps tokens are decoded
from there, greedily, in one compiled loop, its layers unrolled. Layers are of d_model 2048 in bfloat16.
--output is written as soon as a context is measured.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import vmapped
from hybridlm import config as configs
from hybridlm import model as lm
from hybridlm.rows import Rows
from hybridlm.token_cache import TokenCache

RUNS = 3  # of which the fastest counts


def layer(kind: str, d_model: int) -> tuple[str, dict[str, Any]]:
    """A layer of about 4 d_model^2 to 6 d_model^2 parameters."""
    if kind == "attention":
        return kind, {"num_heads": d_model // 64, "head_dim": 64}
    if kind == "kda":
        return kind, {"num_heads": d_model // 128, "head_dim": 128}
    return kind, {"num_heads": 3 * d_model // 512, "head_dim": 128, "v_head_dim": 256}


def definition(linear: str, ratio: int, layers: int, d_model: int) -> lm.Definition:
    """``ratio`` linear layers to one full layer, the full one last; 0 is full attention alone."""
    kinds = ["attention" if i % (ratio + 1) == ratio else linear for i in range(layers)]
    stack = [layer(kind, d_model) for kind in kinds]
    sizes = {"model__d_model": d_model, "mlp_hidden": d_model // 48 * 128, "model__dtype": "bfloat16"}
    return lm.build(configs.resolve(vmapped.config(stack, model__vocab_size=32_000, **sizes)))


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


def filled(shapes: Any, context: int) -> lm.Cache:
    """Caches of these shapes, of zeros, that hold ``context`` tokens."""
    caches = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    is_tokens = lambda leaf: isinstance(leaf, TokenCache)
    set_length = lambda leaf: leaf._replace(length=jnp.int32(context)) if is_tokens(leaf) else leaf
    return jax.tree.map(set_length, caches, is_leaf=is_tokens)


class Decoder(NamedTuple):
    """cache: shapes and dtypes.  run: (params, cache, token, start) -> (token, cache), the loop compiled."""

    cache: Any
    run: Callable


def shapes(definition: lm.Definition) -> Any:
    """Shapes of the parameters, in the dtype of the activations as for serving."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, definition.dtype), lm.shapes(definition))


def compiled(definition: lm.Definition, context: int, batch: int, steps: int) -> Decoder:
    """A loop of ``steps`` steps from ``context`` tokens; nothing is allocated."""
    cache = cache_shapes(definition, batch, context + steps)
    scalars = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    run = decode.lower(shapes(definition), cache, *scalars, definition=definition, steps=steps)
    return Decoder(cache, run.compile())


def measure(decoder: Decoder, params: lm.Params, context: int, batch: int, steps: int) -> dict[str, Any]:
    """Milliseconds a token, and bytes of KV cache and of recurrent state a sequence."""
    token, start = jnp.zeros(batch, jnp.int32), jnp.int32(context)
    sizes, seconds = [], []
    for _ in range(1 + RUNS):  # the first warms up
        cache = jax.block_until_ready(filled(decoder.cache, context))
        sizes = [
            sum(x.nbytes for x in jax.tree.leaves(layer)) * (-1 if isinstance(layer, TokenCache) else 1)
            for layer in cache
        ]
        began = time.perf_counter()
        _, cache = jax.block_until_ready(decoder.run(params, cache, token, start))
        seconds.append(time.perf_counter() - began)
        del cache  # before there is another
    return {
        "ms": 1e3 * min(seconds[1:]) / steps,
        "kv_bytes": -sum(size for size in sizes if size < 0) // batch,
        "state_bytes": sum(size for size in sizes if size > 0) // batch,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", default="1024,4096,16384,65536,262144")
    parser.add_argument("--linear", default="gated_delta_net", choices=("gated_delta_net", "kda"))
    parser.add_argument("--ratios", default="0,3,7", help="linear layers to one full layer; 0 is full alone")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--d_model", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--threads", type=int, default=8, help="that compile")
    parser.add_argument("--output", default="decode.json")
    flags = parser.parse_args()
    ratios = [int(ratio) for ratio in flags.ratios.split(",")]
    print(f"{jax.devices()[0].device_kind}: batch {flags.batch}, {flags.layers} layers, {flags.linear}")
    contexts = [int(context) for context in flags.contexts.split(",")]
    built = {ratio: definition(flags.linear, ratio, flags.layers, flags.d_model) for ratio in ratios}
    cases = [(context, ratio) for context in contexts for ratio in ratios]
    began = time.perf_counter()
    with ThreadPoolExecutor(flags.threads) as pool:
        prepare = lambda case: compiled(built[case[1]], case[0], flags.batch, flags.steps)
        decoders = dict(zip(cases, pool.map(prepare, cases), strict=True))
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    results = []
    constant = lambda x: jnp.full(x.shape, 1e-2, x.dtype)  # a step takes the same time whatever they are
    params = {ratio: jax.tree.map(constant, shapes(built[ratio])) for ratio in ratios}
    for context in contexts:
        row: dict[str, Any] = {"context": context}
        for ratio in ratios:
            measured = measure(decoders[context, ratio], params[ratio], context, flags.batch, flags.steps)
            row[f"{ratio}:1" if ratio else "full"] = measured
        results.append(row)
        Path(flags.output).write_text(json.dumps(results, indent=1))
        base = next(iter(row[name]["ms"] for name in row if name != "context"))
        shown = [
            f"{name}: {r['ms']:.3f} ms ({base / r['ms']:.2f}x), KV {r['kv_bytes'] / 2**20:,.1f} MiB, "
            f"state {r['state_bytes'] / 2**20:.1f} MiB"
            for name, r in row.items()
            if name != "context"
        ]
        print(f"{context:>7,} tokens | " + " | ".join(shown), flush=True)
    last = results[-1]
    speedups = np.array([last["full"]["ms"] / r["ms"] for name, r in last.items() if name != "context"])
    print(f"at {last['context']:,} tokens the hybrids are {speedups[1:].round(2).tolist()} times as fast")


if __name__ == "__main__":
    main()
