"""MQAR at the Based mixture for every mixer: several learning rates and seeds at once, in one program.

    python -m benchmarks.mqar_study --mixers="attention;deltanet;gdn=13200;kda;gla;hybrid" --steps=10000

Two layers without MLP and a tied head, as in Zoology, at d_model 128 and 8192 ids; trained on (length, pairs)
x examples: (64, 4) x 100k, (128, 8), (256, 16), (256, 32), (256, 64) x 20k; tested on (64, 4), (64, 8), (64,
16), (128, 32), (256, 64), (512, 128), (1024, 256) x 1000; the score is the mean over these slices.
Mixers have the state sizes of the published curves. What differs from there: both layers are of the mixer,
with the linear ones' own short convolution of 4, where theirs are a BaseConv and the mixer, so that their
"attention" is nearest to "hybrid" here; slices are mixed in a batch; fewer epochs (in the table).

Prints a table and writes JSON to --output.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import vmapped
from benchmarks.vmapped import Case, Layer
from hybridlm import config as configs
from hybridlm import model
from hybridlm.data import mqar
from hybridlm.data.source import Batch

TRAIN = [(64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000)]
TEST = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]

GDN = ("gated_delta_net", {"num_heads": 1, "head_dim": 128, "v_head_dim": 256})
FULL = ("attention", {"num_heads": 2, "head_dim": 64})
ROPE_FREE = ("attention", {"num_heads": 2, "head_dim": 64, "rope_theta": 0.0})
GLA = ("gla", {"num_heads": 1, "head_dim": 64, "v_head_dim": 128, "conv_size": 4})
# name -> two layers, and the published accuracy nearest in state size (Zoology's README, read off its figure)
STUDY: dict[str, tuple[list[Layer], str]] = {
    "attention": ([FULL] * 2, ""),
    "attention, RoPE then NoPE": ([FULL, ROPE_FREE], ""),
    "deltanet": ([("delta_net", {"num_heads": 1, "head_dim": 128})] * 2, ".96 (34k)"),
    "gdn": ([GDN] * 2, ".99 (66k)"),
    "kda": ([("kda", {"num_heads": 1, "head_dim": 128})] * 2, ""),
    "gla": ([GLA] * 2, ".77 (18k)"),
    "hgrn2": ([("hgrn2", {"num_heads": 1, "head_dim": 128, "conv_size": 4})] * 2, ""),
    "retnet": ([("retnet", {"num_heads": 1, "head_dim": 128, "v_head_dim": 256, "conv_size": 4})] * 2, ""),
    "mamba2": ([("mamba2", {"head_dim": 64, "state_size": 64})] * 2, ".785 at 33k"),
    "based": ([("based", {"num_heads": 2, "conv_size": 4})] * 2, ".91 (40k)"),
    "rwkv7": ([("rwkv7", {"num_heads": 2, "head_dim": 64})] * 2, ".815 (17k)"),
    "gated_delta_product": (
        [("gated_delta_product", {"num_heads": 1, "head_dim": 128, "v_head_dim": 128})] * 2,
        "",
    ),
    "mlstm": ([("mlstm", {"num_heads": 1, "head_dim": 128, "v_head_dim": 128, "conv_size": 4})] * 2, ""),
    "mom": (
        [("mom", {"of": ("gated_delta_net", {"num_heads": 1, "head_dim": 64, "v_head_dim": 64})})] * 2,
        "",
    ),
    "hybrid": ([GLA, ROPE_FREE], "1.0 (a convolution, attention)"),
}


def rows(length: int, pairs: int, examples: int, seq_len: int, vocab: int, split: str) -> Batch:
    """All rows of one slice."""
    task = mqar.Config(slices=f"({length}, {pairs})", random_non_queries=False)
    return vmapped.rows(task, split, seq_len, vocab, examples)


def state_elements(layers: Sequence[Layer], d_model: int) -> float:
    config = configs.resolve(vmapped.config(layers, model__d_model=d_model))
    return sum(layer.cost(d_model, 1024).state for layer in model.build(config).layers)


def main() -> None:
    parser = vmapped.parser(
        __doc__, rates=[1e-3, 3e-3, 1e-2, 3e-2], steps=20_000, until=2.0, output="mqar_study.json"
    )
    every = ";".join(STUDY)
    parser.add_argument("--mixers", default=every, help="separated by ;, NAME=STEPS gives one its own")
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", help="of activations; parameters are float32")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the training and test examples")
    parser.add_argument("--max_test_length", type=int, default=1024)
    flags = parser.parse_args()
    scaled = lambda count: max(8, int(count * flags.scale))
    parts = [rows(length, pairs, scaled(n), 256, flags.vocab, "train") for length, pairs, n in TRAIN]
    train = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    width = min(flags.max_test_length, max(length for length, _ in TEST))
    shown = [(length, pairs) for length, pairs in TEST if length <= width]
    tests = {str(one): rows(*one, scaled(1000), width, flags.vocab, "val") for one in shown}

    def case(name: str, steps: int) -> Case:
        sizes = {
            "model__d_model": flags.d_model,
            "model__vocab_size": flags.vocab,
            "model__dtype": flags.dtype,
        }
        config = vmapped.config(STUDY[name][0], steps=steps, train__batch_size=flags.batch_size, **sizes)
        return Case(config, train, tests)

    def show(r: dict[str, Any]) -> str:
        layers, published = STUDY[r["name"]]
        state = f"{state_elements(layers, flags.d_model):,}"
        told = [r["name"], state, vmapped.spread(r["score"]), published, f"{r['rate']:.2g}", r["steps"]]
        return vmapped.row(*told, f"{r['epochs']:.1f}", *(f"{value:.3f}" for value in r["slices"].values()))

    given = [item.partition("=") for item in flags.mixers.split(";")]
    wanted = {name.strip(): int(own or flags.steps) for name, _, own in given}
    head = ("mixer", "state", "score (min to max of seeds)", "published", "rate", "steps", "epochs", *tests)
    vmapped.study(
        {name: functools.partial(case, name, steps) for name, steps in wanted.items()}, flags, head, show
    )


if __name__ == "__main__":
    main()
