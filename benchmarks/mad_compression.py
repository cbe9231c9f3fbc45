"""MAD's compression task (Poli et al. 2024, arXiv 2403.17844): a whole row through one hidden state.

    python -m benchmarks.mad_compression --mixers="attention;gla;deltanet" --lengths=32

Random tokens, then a mark; the model's hidden state at the mark is all that a decoder gets, which names the
token at each position: two layers of GELU behind norms, as wide as the model, on the state plus sines and
cosines of the position. A language model has no such decoder, so this task is no part of `eval`. As there:
width 128, mixer and SwiGLU twice, 12,800 examples, batch 128, 200 epochs, best of learning rates; the mark
is named too. What differs: the state has passed a norm of the model's.

The decoder is the stack's last layer, which leaves the stream alone, and the objective reads what it records.
Prints a table and writes JSON to --output.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import vmapped
from benchmarks.vmapped import Case, Layer
from hybridlm import config as configs
from hybridlm import loss, mixers, objectives
from hybridlm import model as lm
from hybridlm.context import Context
from hybridlm.data.source import Batch
from hybridlm.layers import Linear
from hybridlm.rows import Rows

HEADS = {"num_heads": 1, "head_dim": 128}
STUDY: dict[str, Layer] = {
    "attention": ("attention", HEADS),
    "deltanet": ("delta_net", HEADS),
    "gdn": ("gated_delta_net", {**HEADS, "v_head_dim": 128}),
    "kda": ("kda", HEADS),
    "gla": ("gla", {"num_heads": 1, "head_dim": 64, "v_head_dim": 128}),
    "hgrn2": ("hgrn2", HEADS),
    "retnet": ("retnet", {**HEADS, "v_head_dim": 128}),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig(mixers.Config):
    """The decoder has no settings."""

    def cost(self, d_model: int, context: int) -> mixers.Cost:
        return mixers.Cost()


class Decoder(mixers.TokenMixer):
    """Adds nothing; records "readout" [B, T, D], which follows from the last token and the position."""

    config_class = DecoderConfig

    def __init__(self, config: DecoderConfig, site: mixers.Site, *, rngs: Any):
        layer = lambda: Linear(site.d_model, site.d_model, rngs=rngs, axes=("embed", None), bias=True)
        self.first, self.second = layer(), layer()

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        x = x_BTD[:, -1:] + sines(*x_BTD.shape[1:])
        for layer in (self.first, self.second):
            x = jax.nn.gelu(layer(normalized(x)))
        context.record("readout", normalized(x))
        return jnp.zeros_like(x_BTD), cache


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(objectives.Config):
    """The objective has no settings."""


class Objective(objectives.Objective):
    """Cross-entropy of the head on what the decoder reads out."""

    config_class = ObjectiveConfig

    def __init__(self, config: ObjectiveConfig, definition: lm.Definition, token_bytes: Any = None):
        self.definition = definition

    def loss(
        self, params: lm.Params, frozen: lm.Params, batch: objectives.Batch, wanted: tuple[str, ...] = ()
    ) -> tuple[jax.Array, objectives.Sums]:
        model = lm.merge(self.definition, params | frozen)
        rows = Rows(batch["segment_ids"], batch["positions"])
        _, records = model.forward(batch["tokens"], rows, ("readout",))
        [readout] = records.values()
        total, sums = loss.cross_entropy(readout, model.head_matrix(), batch["targets"])
        return total, {"loss_sum": total, "tokens": sums.tokens, "correct": sums.correct}


def sines(length: int, width: int) -> jax.Array:
    """[length, width]: sines in the first half of the channels, cosines in the other."""
    frequency = 10_000.0 ** -(jnp.arange(width // 2) / (width // 2 - 1))
    angle = jnp.arange(length)[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)


def normalized(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def rows(examples: int, length: int, vocab: int, seed: int) -> Batch:
    """Tokens 0 to vocab - 2 and the mark vocab - 1 at the end; every token is a label."""
    tokens = np.random.default_rng(seed).integers(vocab - 1, size=(examples, length), dtype=np.int32)
    tokens[:, -1] = vocab - 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens, "targets": tokens, "segment_ids": np.ones_like(tokens), "positions": positions
    }  # fmt: skip


def config(layer: Layer, vocab: int, **fields: Any) -> ConfigDict:
    """Two of ``layer``, then the decoder."""
    layers = [layer, layer, ("benchmarks.mad_compression:Decoder", {})]
    made = vmapped.config(layers, model__vocab_size=vocab, model__tie_embeddings=False, **fields)
    made.model.pattern += "/none"
    made.objective = configs.objective("benchmarks.mad_compression:Objective")
    return made


def main() -> None:
    parser = vmapped.parser(
        __doc__, rates=[1e-4, 5e-4, 1e-3], until=0.995, batch_size=128, output="mad_compression.json"
    )
    parser.add_argument("--mixers", default=";".join(STUDY), help="separated by semicolons")
    parser.add_argument("--lengths", default="32", help="MAD has 32, 64, 128, 256")
    parser.add_argument("--vocab", type=int, default=16)
    parser.add_argument("--examples", type=int, default=12_800)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    flags = parser.parse_args()

    def case(name: str, length: int) -> Case:
        train, test = (rows(n, length, flags.vocab, seed) for n, seed in ((flags.examples, 1), (1280, 2)))
        steps = flags.steps or flags.epochs * flags.examples // flags.batch_size
        sizes = {"model__d_model": 128, "mlp_hidden": 512, "train__batch_size": flags.batch_size}
        made = config(
            STUDY[name], flags.vocab, steps=steps, optimizer__weight_decay=flags.weight_decay, **sizes
        )
        return Case(made, train, {"": test})

    def show(r: dict[str, Any]) -> str:
        guessing = f"{1 / (flags.vocab - 1):.3f}"
        return vmapped.row(r["name"], vmapped.spread(r["score"]), guessing, f"{r['rate']:g}", r["steps"])

    cases = {
        f"{name}, {length}": functools.partial(case, name.strip(), length)
        for name in flags.mixers.split(";")
        for length in map(int, flags.lengths.split(","))
    }
    head = ("mixer, length", "score (min to max of seeds)", "guessing", "rate", "steps")
    vmapped.study(cases, flags, head, show)


if __name__ == "__main__":
    main()
