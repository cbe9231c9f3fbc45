"""Joint recall (HAX, arXiv 2507.00449) in two layers: linear stacks, attention, and one of each.

    python -m benchmarks.joint_recall_study --stacks="mamba2;gdn;kda;full;mamba2 full;gdn full;kda full"

`hybridlm.data.joint_recall`: 8 contexts of 8 keys, 274 tokens, 16 values, so guessing gets 0.0625. Width 64,
no MLP, two heads; a linear layer keeps 2 x 16 x 16 numbers, fewer slots than the 64 pairs, so by itself it
should fail, and a linear layer below attention solve it (the last context is a state, the pair a look-up).
Every layer has a short convolution of 4. Several learning rates and seeds are one program.
"""

import functools
from typing import Any

from benchmarks import vmapped
from benchmarks.ratio_study import FULL
from benchmarks.vmapped import Case, Layer
from hybridlm.data import joint_recall
from hybridlm.data.source import Batch

CONTEXTS, KEYS = 8, 8
SMALL = {"num_heads": 2, "head_dim": 16, "conv_size": 4}
LAYERS: dict[str, Layer] = {
    "gdn": ("gated_delta_net", {**SMALL, "v_head_dim": 16}),
    "kda": ("kda", {**SMALL, "v_head_dim": 16}),
    "gla": ("gla", {**SMALL, "v_head_dim": 16}),
    "mamba2": ("mamba2", {**SMALL, "state_size": 16}),
    "full": FULL,
}


def rows(count: int, split: str) -> Batch:
    task = joint_recall.Config(contexts=CONTEXTS, keys=KEYS)
    return vmapped.rows(task, split, joint_recall.length(CONTEXTS, KEYS), 64, count)


def main() -> None:
    parser = vmapped.parser(
        __doc__, rates=[1e-3, 3e-3], steps=4000, until=0.995, seeds=3, batch_size=64,
        output="joint_recall_study.json",
    )  # fmt: skip
    every = "mamba2;gdn;kda;full;mamba2 full;gdn full;kda full"
    parser.add_argument("--stacks", default=every, help="separated by ;, one layer stands for two")
    parser.add_argument("--rows", type=int, default=1 << 17, help="of the training set")
    flags = parser.parse_args()
    train, test = rows(flags.rows, "train"), {"held out": rows(min(1000, flags.rows), "val")}

    def case(name: str) -> Case:
        stack = [LAYERS[one] for one in (name.split() * 2)[:2]]
        sizes = {"model__d_model": 64, "model__vocab_size": 64, "optimizer__b2": 0.95}
        config = vmapped.config(stack, steps=flags.steps, train__batch_size=flags.batch_size, **sizes)
        return Case(config, train, test)

    def show(r: dict[str, Any]) -> str:
        trained, seeds = f"{max(r['trained']):.3f}", " ".join(f"{one:.3f}" for one in r["score"])
        return vmapped.row(r["name"], trained, seeds, f"{r['rate']:g}", r["steps"], r["seconds"])

    wanted = [one.strip() for one in flags.stacks.split(";")]
    head = ("stack", "training, best seed", "held out, each seed", "rate", "steps", "seconds")
    vmapped.study({name: functools.partial(case, name) for name in wanted}, flags, head, show)


if __name__ == "__main__":
    main()
