"""MAD's compression task (Poli et al. 2024, arXiv 2403.17844): a whole row through one hidden state.

    python -m benchmarks.mad_compression --mixers="attention;gla;deltanet" --lengths=32

Random tokens, then a mark; the model's hidden state at the mark is all that a decoder gets, which names the
token at each position: two layers of GELU behind norms, as wide as the model, on the state plus sines and
cosines of the position. A language model has no such decoder, so this task is no part of `eval`. As there:
width 128, mixer and SwiGLU twice, 12,800 examples, batch 128, 200 epochs, best of learning rates; the mark
is named too. What differs: the state has passed the model's final norm.

Prints a table and writes JSON to --output.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import vmapped
from hybridlm import model as lm

HEADS = {"num_heads": 1, "head_dim": 128}
STUDY: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", HEADS),
    "deltanet": ("delta_net", HEADS),
    "gdn": ("gated_delta_net", {**HEADS, "v_head_dim": 128}),
    "kda": ("kda", HEADS),
    "gla": ("gla", {"num_heads": 1, "head_dim": 64, "v_head_dim": 128}),
    "hgrn2": ("hgrn2", HEADS),
    "retnet": ("retnet", {**HEADS, "v_head_dim": 128}),
}


class Decoder(NamedTuple):
    """Of width D, for V tokens: two hidden layers [D, D] and the last one [D, V], each with a bias."""

    kernels: tuple[jax.Array, jax.Array]
    biases: tuple[jax.Array, jax.Array]
    head: jax.Array


def rows(examples: int, length: int, vocab: int, seed: int) -> vmapped.Data:
    """Tokens 0 to vocab - 2 and the mark vocab - 1 at the end; every token is a label."""
    tokens = np.random.default_rng(seed).integers(vocab - 1, size=(examples, length))
    tokens[:, -1] = vocab - 1
    batch = {"tokens": tokens, "targets": tokens}
    return vmapped.data([(batch, length)])


def sines(length: int, width: int) -> jax.Array:
    """[length, width]: sines in the first half of the channels, cosines in the other."""
    frequency = 10_000.0 ** -(jnp.arange(width // 2) / (width // 2 - 1))
    angle = jnp.arange(length)[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)


def normalized(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def problem(definition: lm.Definition, vocab: int) -> vmapped.Problem:
    width, encoder = definition.d_model, vmapped.language_model(definition)

    def init(key: jax.Array) -> tuple[lm.Params, Decoder]:
        first, *keys = jax.random.split(key, 4)
        shapes = [(width, width), (width, width), (width, vocab)]
        a, b, head = (0.02 * jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
        return encoder.init(first), Decoder((a, b), (jnp.zeros(width), jnp.zeros(width)), head)

    def readout(params: tuple[lm.Params, Decoder], batch: vmapped.Data) -> tuple:
        parameters, decoder = params
        state_BD = vmapped.hidden_states(lm.merge(definition, parameters), batch)[:, -1]
        x = state_BD[:, None] + sines(batch.labels.shape[1], width)
        for kernel, bias in zip(decoder.kernels, decoder.biases, strict=True):
            x = jax.nn.gelu(normalized(x) @ kernel + bias)
        return normalized(x), decoder.head, batch.labels

    decays = (encoder.decays, Decoder((True, True), (False, False), True))
    return vmapped.Problem(init, decays, readout)


def study(name: str, length: int, flags: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    train, test = (rows(n, length, flags.vocab, seed) for n, seed in ((flags.examples, 1), (1280, 2)))
    layers = [STUDY[name]] * 2
    definition = vmapped.definition(layers, d_model=128, vocab=flags.vocab, mlp_hidden=512)
    definition = dataclasses.replace(definition, tie_embeddings=False)
    rates = [float(rate) for rate in flags.rates.split(",")]
    runs = vmapped.runs(
        problem(definition, flags.vocab), rates=rates, seeds=range(flags.seeds), batch_size=128,
        weight_decay=flags.weight_decay,
    )  # fmt: skip
    runs = vmapped.compiled(runs, train, vmapped.first_rows(test, 128))
    steps = flags.epochs * flags.examples // 128
    result = vmapped.train(runs, train, steps=steps, seconds=flags.seconds, say=say)
    correct = vmapped.count_correct(runs, result.params, test, 128).mean(axis=1) / length
    score = correct.reshape(len(rates), len(runs.seeds))
    best = int(score.mean(axis=1).argmax())
    return {
        "mixer": name, "length": length, "score": score[best].tolist(), "rate": rates[best],
        "chance": 1 / (flags.vocab - 1), "steps": result.steps, "seconds": round(result.seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixers", default=";".join(STUDY), help="separated by semicolons")
    parser.add_argument("--lengths", default="32", help="MAD has 32, 64, 128, 256")
    parser.add_argument("--vocab", type=int, default=16)
    parser.add_argument("--examples", type=int, default=12_800)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--rates", default="1e-4,5e-4,1e-3")
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60, help="of training for each line of the table")
    parser.add_argument("--output", default="mad_compression.json")
    flags = parser.parse_args()
    results = []
    print("| mixer | length | score (min to max of seeds) | guessing | rate | steps |\n|" + "---|" * 6)
    for name in flags.mixers.split(";"):
        for length in map(int, flags.lengths.split(",")):
            r = study(name.strip(), length, flags, lambda text: None)
            results.append(r)
            Path(flags.output).write_text(json.dumps(results, indent=1))
            score = f"{np.mean(r['score']):.3f} ({min(r['score']):.3f} to {max(r['score']):.3f})"
            cells = [r["mixer"], r["length"], score, f"{r['chance']:.3f}", f"{r['rate']:g}", r["steps"]]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
