"""Recall against the share of full layers: MQAR, many seeds a point, all seeds and rates in one program.

    python -m benchmarks.ratio_study --layers=4 --mixers="kda;gated_delta_net" --ratios="full;pure;3:1;1:1"
    python -m benchmarks.ratio_study --layers=14 --ratios="full;pure;6:1;3:1;1:1" --steps=20000

2, 4 and 8 pairs in 32 tokens of 64 ids; half of the rows have the fewest pairs, which teach. A linear layer's
state is two heads of 4 x 4, so that no linear stack holds all pairs by size alone. What an earlier study of
14 layers lacked is here: *every* layer has a short convolution of 4, attention's on its input, without which
deep stacks of attention stayed at the plateau; AdamW with b2 0.95 at several rates; as many seeds as fit.

Runs are bimodal, so no mean over seeds is given but: how many left the plateau (guessing among the values of
a row) and how many reached 90%, after how many training tokens (median by Kaplan and Meier, the others
censored at the end), and the recall of those that left. Curves are of training batches; rows come again when
they run out (--rows). With --minutes cases that there is no time for are named and left out.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from benchmarks import vmapped
from benchmarks.vmapped import Case, Layer
from eval import convergence
from hybridlm import config as configs
from hybridlm import cost, mixers, pattern
from hybridlm.context import Context
from hybridlm.data import mqar
from hybridlm.data.source import Batch
from hybridlm.layers import ShortConv
from hybridlm.mixers import attention
from hybridlm.report import quantity

SLICES = {2: 0.5, 4: 0.25, 8: 0.25}  # pairs -> share of the rows
LENGTH, VOCAB, WIDTH, CONV = 32, 64, 64, 4
SMALL = {"num_heads": 2, "head_dim": 4, "conv_size": CONV}
LINEAR: dict[str, Layer] = {
    **{kind: (kind, {**SMALL, "v_head_dim": 4}) for kind in ("kda", "gated_delta_net", "gla", "retnet")},
    **{kind: (kind, SMALL) for kind in ("delta_net", "hgrn2")},
    "mamba2": ("mamba2", {**SMALL, "state_size": 4}),
}
FULL: Layer = ("benchmarks.ratio_study:Attention", {"num_heads": 2, "head_dim": 32})


@dataclasses.dataclass(frozen=True)
class AttentionConfig(attention.Config):
    """Softmax attention behind a short convolution of `CONV` taps."""


class Attention(attention.Mixer):
    """What linear layers have and attention has not: a look at the token before. Zoology's models have it."""

    config_class = AttentionConfig

    def __init__(self, config: AttentionConfig, site: mixers.Site, *, rngs: Any):
        super().__init__(config, site, rngs=rngs)
        self.conv = ShortConv(site.d_model, CONV, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        y_BTD, _ = self.conv(x_BTD, context.rows)
        return super().__call__(y_BTD, context, cache)


def rows(count: int, split: str, pairs: int) -> Batch:
    """``count`` rows with ``pairs`` pairs."""
    task = mqar.Config(num_pairs=pairs, random_non_queries=False)
    return vmapped.rows(task, split, LENGTH, VOCAB, count)


def plateau() -> float:
    """Accuracy of guessing among the values of a row, over all labels: one a row."""
    return 1 / sum(pairs * share for pairs, share in SLICES.items())


def stack(mixer: str, ratio: str, num_layers: int) -> list[Layer]:
    """ratio: "pure", "full", "r:1", or indices of the full layers like "0,1"."""
    if ratio in ("pure", "full"):
        return [LINEAR[mixer] if ratio == "pure" else FULL] * num_layers
    where: Any = [int(i) for i in ratio.split(",")] if ":" not in ratio else "last"
    named = pattern.ratio("l", "f", int(ratio.split(":")[0]) if ":" in ratio else 1, num_layers, where)
    return [FULL if name == "f" else LINEAR[mixer] for name in pattern.fill(pattern.parse(named), num_layers)]


def names(mixer_names: str, ratios: str, num_layers: int) -> list[tuple[str, str]]:
    """(mixer, ratio) of each case, attention alone first; no ratio that the depth has no room for."""
    wanted = [one.strip() for one in mixer_names.split(";")], [one.strip() for one in ratios.split(";")]
    room = lambda ratio: ratio != "full" and (":" not in ratio or int(ratio.split(":")[0]) < num_layers)
    alone = [("attention", "full")] * ("full" in wanted[1])
    return [*alone, *((m, r) for m in wanted[0] for r in wanted[1] if room(r))]


def main() -> None:
    parser = vmapped.parser(
        __doc__, rates=[1e-3, 3e-3], steps=2000, until=0.99, seeds=10, steps_per_call=40,
        output="ratio_study.json",
    )  # fmt: skip
    parser.add_argument("--mixers", default="kda;gated_delta_net;hgrn2;mamba2", help="separated by ;")
    parser.add_argument(
        "--ratios", default="full;pure;6:1;3:1;1:1", help="separated by ;, or layers like 0,1"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--mlp_hidden", type=int, default=128)
    parser.add_argument("--rows", type=int, default=1 << 17, help="of the training set")
    parser.add_argument("--minutes", type=float, help="after which no further case begins")
    flags = parser.parse_args()
    parts = [rows(int(flags.rows * share), "train", pairs) for pairs, share in SLICES.items()]
    train = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    tests = {f"{pairs} pairs": rows(1000, "val", pairs) for pairs in SLICES}
    tokens = flags.batch_size * LENGTH  # of a step
    described: dict[str, list[Any]] = {}

    def case(name: str, mixer: str, ratio: str) -> Case:
        layers = stack(mixer, ratio, flags.layers)
        sizes = {"model__d_model": WIDTH, "model__vocab_size": VOCAB, "optimizer__b2": 0.95}
        made = vmapped.config(
            layers, steps=flags.steps, mlp_hidden=flags.mlp_hidden, train__batch_size=flags.batch_size,
            train__seq_len=LENGTH, **sizes,
        )  # fmt: skip
        told = cost.summary(configs.resolve(made))
        kept = told["state_bytes"] + told["cache_bytes"]
        described[name] = [sum(one is FULL for one in layers), f"{told['parameters']:,}", quantity(kept, "B")]
        return Case(made, train, tests)

    def show(r: dict[str, Any]) -> str:
        curves = [[(step * tokens, hits[seed]) for step, hits in r["curves"]] for seed in range(flags.seeds)]
        found = [convergence.of(curve, plateau()) for curve in curves]
        left, high = (convergence.times([one for one in found if one], what) for what in ("left", "reached"))
        learnt = [score for score, one in zip(r["score"], found, strict=True) if one and one.left is not None]
        after = lambda t: (
            f"{t.events}/{t.runs} ({t.low:.2f}-{t.high:.2f}), "
            + (f"> {quantity(r['steps'] * tokens, '')}" if t.median is None else quantity(t.median, ""))
        )
        best = vmapped.spread(learnt) if learnt else ""
        slices = (f"{value:.3f}" for value in r["slices"].values())
        return vmapped.row(
            r["name"], *described[r["name"]], f"{r['rate']:g}", after(left), after(high), best, *slices
        )

    every = names(flags.mixers, flags.ratios, flags.layers)
    labels = {f"{mixer} {ratio}": (mixer, ratio) for mixer, ratio in every}
    cases = {name: functools.partial(case, name, *one) for name, one in labels.items()}
    head = ("stack", "full layers", "parameters", "state + KV", "rate", "left the plateau, tokens",
            "reached 90%, tokens", "recall of those that left", *tests)  # fmt: skip
    vmapped.study(cases, flags, head, show)


if __name__ == "__main__":
    main()
