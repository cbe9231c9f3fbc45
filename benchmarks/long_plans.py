"""What steps of large hybrids over long rows need of GPUs that are not there: the table of docs/long.md.

    JAX_PLATFORMS=cpu python -m benchmarks.long_plans [--models 1.3b,7b] [--ratios 3:1,7:1]
        [--tokens 32768,131072,1048576] [--gpus 8,64]

A line a step, as soon as it is compiled, a minute or two each (`hybridlm.ahead` says what it takes). A device
has 32,768 tokens where there are GPUs enough, and a step one row for each group of devices. `model.remat` is
full, which needs least.
"""

import argparse
import itertools

from hybridlm import ahead, cost
from hybridlm import config as configs

EACH = 32768  # tokens of a device, if a row's devices are as many
SPEED = 400e12  # of an H100 in bfloat16, operations a second, as large models reach them
BASE = "configs/hybrid.py:1.3b,kda,3:1"
MODELS = {
    "1.3b": {},
    "7b": {
        "model.d_model": "4096", "model.num_layers": "32", "model.mlp_hidden": "11008",
        "mixers.full.head_dim": "128", "mixers.full.num_kv_heads": "8",
    },
}  # fmt: skip
HEAD = (
    "model",
    "tokens",
    "GPUs",
    "fsdp x context",
    "state",
    "temporaries",
    "GiB",
    "sent",
    "sent, s",
    "work, s",
)


def line(model: str, ratio: str, tokens: int, gpus: int) -> list[str]:
    """What stands below `HEAD`: GiB of a device, seconds of its exchanges and of its operations."""
    context = min(gpus, max(1, tokens // EACH))
    rows = gpus // context
    config = configs.resolve(configs.load(BASE, MODELS[model] | {
        "model.pattern": f"kda*{ratio.removesuffix(':1')} full", "model.remat": "full",
        "train.seq_len": str(tokens), "train.batch_size": str(rows),
        "mesh.fsdp": str(rows), "mesh.context": str(context),
    }))  # fmt: skip
    found = ahead.needs(config, f"h100:{gpus}")
    gib = lambda size: f"{size / 2**30:.1f}"
    work = cost.train_flops_per_token(config) * rows * tokens / gpus / SPEED
    fits = "" if found.memory < ahead.CARD_BYTES else " does NOT fit"
    sent = gib(sum(found.sent.values())), f"{found.seconds:.2f}"
    memory = gib(found.arguments), gib(found.temporaries), gib(found.memory) + fits
    return [
        f"{model} {ratio}",
        f"{tokens:,}",
        f"{gpus}",
        f"{rows} x {context}",
        *memory,
        *sent,
        f"{work:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, given in (
        ("models", "1.3b,7b"), ("ratios", "3:1,7:1"), ("tokens", "32768,131072,1048576"), ("gpus", "8,64"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", default=given)
    flags = parser.parse_args()
    print("|", " | ".join(HEAD), "|\n" + "|---" * len(HEAD) + "|")
    for steps in itertools.product(*(listed.split(",") for listed in vars(flags).values())):
        model, ratio, tokens, gpus = steps
        print("|", " | ".join(line(model, ratio, int(tokens), int(gpus))), "|", flush=True)


if __name__ == "__main__":
    main()
