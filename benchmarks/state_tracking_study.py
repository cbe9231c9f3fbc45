"""State tracking with and without negative eigenvalues: learning rates and seeds at once, in one program.

    python -m benchmarks.state_tracking_study --groups=parity,S3 --steps=2000

Word problems of `hybridlm.data.state_tracking`: trained on 100k words of 128 elements, a label at every one;
tested on 512. Parity needs an eigenvalue of -1 (arXiv 2411.12537), and S3 in one layer two Householder steps
a token with them (arXiv 2502.10297), so one layer of these mixers should fail on S3 either way. Width 128,
four heads, SwiGLU of 256.
"""

import functools
from typing import Any

from benchmarks import vmapped
from benchmarks.vmapped import Case, Layer
from hybridlm.data import state_tracking
from hybridlm.data.source import Batch

HEADS = {"num_heads": 4, "head_dim": 32}
STUDY: dict[str, Layer] = {
    "attention": ("attention", HEADS),
    "gla": ("gla", {**HEADS, "conv_size": 4}),
    "deltanet": ("delta_net", HEADS),
    "deltanet, negative": ("delta_net", {**HEADS, "neg_eigval": True}),
    "gdn": ("gated_delta_net", HEADS),
    "gdn, negative": ("gated_delta_net", {**HEADS, "neg_eigval": True}),
    "kda": ("kda", HEADS),
    "kda, negative": ("kda", {**HEADS, "neg_eigval": True}),
    "gdp": ("gated_delta_product", {**HEADS, "neg_eigval": False}),
    "gdp, negative": ("gated_delta_product", HEADS),
    "rwkv7": ("rwkv7", HEADS),
    "rwkv7, negative": ("rwkv7", {**HEADS, "neg_eigval": True}),
    "mamba2": ("mamba2", {"head_dim": 64, "state_size": 64}),
    "mlstm": ("mlstm", {**HEADS, "conv_size": 4}),
}


@functools.cache
def rows(group: str, count: int, length: int, split: str) -> Batch:
    """``group`` is a group's name; "S3-swaps" draws from its exchanges of two points alone."""
    name, _, only = group.partition("-")
    task = state_tracking.Config(group=name, only_swaps=only == "swaps")
    return vmapped.rows(task, split, length, 128, count)


def main() -> None:
    defaults = {"rates": [3e-4, 1e-3, 3e-3], "steps": 20_000, "until": 0.995, "batch_size": 256}
    parser = vmapped.parser(__doc__, **defaults, output="state_tracking_study.json")
    parser.add_argument("--groups", default="parity,S3")
    parser.add_argument("--mixers", default=";".join(STUDY), help="separated by semicolons")
    parser.add_argument("--layers", default="1,2")
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--test_examples", type=int, default=512)
    parser.add_argument("--lengths", default="128,512", help="trained on, tested on")
    flags = parser.parse_args()
    trained_on, tested_on = map(int, flags.lengths.split(","))

    def case(group: str, layers: int, name: str) -> Case:
        sizes = {"model__d_model": 128, "model__vocab_size": 128, "train__batch_size": flags.batch_size}
        sizes |= {"mlp_hidden": 256, "optimizer__weight_decay": 1e-6, "steps": flags.steps}
        config = vmapped.config([STUDY[name]] * layers, **sizes)
        test = rows(group, flags.test_examples, tested_on, "val")
        return Case(config, rows(group, flags.examples, trained_on, "train"), {str(tested_on): test})

    def show(r: dict[str, Any]) -> str:
        group = r["name"].partition(",")[0].partition("-")[0]
        guessing = f"{1 / len(state_tracking.elements(group)):.3f}"
        trained, score = f"{max(r['trained']):.3f}", vmapped.spread(r["score"])
        return vmapped.row(r["name"], trained, score, guessing, f"{r['rate']:g}", r["steps"])

    cases = {}
    for group in flags.groups.split(","):
        rows(group, flags.examples, trained_on, "train")  # once, not in every thread
        for layers in map(int, flags.layers.split(",")):
            for name in (one.strip() for one in flags.mixers.split(";")):
                cases[f"{group}, {name}, {layers} layers"] = functools.partial(case, group, layers, name)
    head = (
        "task, mixer",
        f"trained, {trained_on}",
        f"{tested_on}, mean (min to max)",
        "guessing",
        "rate",
        "steps",
    )
    vmapped.study(cases, flags, head, show)


if __name__ == "__main__":
    main()
