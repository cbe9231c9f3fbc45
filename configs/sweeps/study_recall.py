"""The MQAR study again, four mixers, with a look at the token before in every layer and ten seeds.

    python -m launch.sweep --config=configs/sweeps/study_recall.py --workdir=runs/study_recall
    python -m launch.sweep --config=configs/sweeps/study_recall.py:14 --workdir=runs/study_recall14

The argument is the number of layers. What 14 layers of study_mqar.py lacked is here: attention has a short
convolution on its input, too, without which deep stacks of it stayed at the plateau; AdamW with b2 0.95 at
two rates; half of the rows have the fewest pairs, which teach. Runs are bimodal, so no mean says much: the
report tells how many left the plateau and how many reached 90%, and after how many tokens.
"""

import dataclasses

from hybridlm.errors import ConfigError
from launch import grid
from launch.grid import Sweep, axis

MIXERS = ("kda", "gdn", "hgrn2", "mamba2")
SMALL = {"num_heads": 2, "head_dim": 4, "conv_size": 4}


def get_sweep(layers: str = "4") -> Sweep:
    if layers not in ("4", "14"):
        raise ConfigError("--config", f"study_recall.py:{layers}", "must be study_recall.py:4 or :14")
    mqar = grid.load("configs/sweeps/study_mqar.py")
    fields = {name: value for name, value in mqar.fields.items() if not name.startswith("mixers.")}
    del fields["optimizer.learning_rate"]
    ratios = ("pure", "3:1", "1:1", "full") if layers == "4" else ("pure", "6:1", "3:1", "1:1", "full")
    fields |= {f"mixers.{mixer}.{name}": value for mixer in MIXERS for name, value in SMALL.items()}
    fields |= {f"mixers.{mixer}.v_head_dim": 4 for mixer in MIXERS if mixer != "mamba2"}
    fields |= {
        "mixers.mamba2.state_size": 4,
        "mixers.full.kind": "benchmarks.conv_attention:Mixer",
        "mixers.full.num_heads": 2,
        "mixers.full.head_dim": 32,
        "model.num_layers": int(layers),
        "model.mlp_hidden": 128,
        "data.slices": "(32, 2, 2), (32, 4), (32, 8)",
        "train.batch_size": 128,
        "train.steps": 2000 if layers == "4" else 20_000,
        "optimizer.name": "adamw",
        "optimizer.b2": 0.95,
        "optimizer.warmup_steps": 100,
        "eval.every_steps": 40,
    }
    axes = [
        axis("mixer", *MIXERS), axis("ratio", *ratios), axis("learning_rate", 1e-3, 3e-3),
        axis("seed", *range(10)),
    ]  # fmt: skip
    return dataclasses.replace(mqar, fields=fields, axes=axes, also=(), match="")
