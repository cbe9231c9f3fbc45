"""The language models of study_lm.py on twenty times the text: four mixers, four ratios, attention.

    python -m launch.sweep --config=configs/sweeps/study_lm_large.py:data/source --workdir=runs/study_lm_large
    python -m launch.sweep --config=configs/sweeps/study_lm_large.py:data/source,first --workdir=...
    python -m launch.sweep --config=configs/sweeps/study_lm_large.py:data/source,whole,30e6 --workdir=...

14 layers of width 576, about 56M parameters, 200M bytes each. Two questions come first, which the second line
runs alone: does recall rise below 3:1, and does 3:1 beat attention (pure, 3:1 and full of kda and
gated_delta_net, two seeds); the third trains on fewer bytes. The same command goes on where one was stopped,
run by run from its newest checkpoint. Recall in the loop at the trained length and at four times that;
`python -m eval` has the rest.
"""

import dataclasses

from launch import grid
from launch.grid import Sweep, axis

MIXERS, WIDTH = ("kda", "gdn", "hgrn2", "mamba2"), 576
HEADS = {"num_heads": WIDTH // 64, "head_dim": 64}


def get_sweep(arg: str = "data/source") -> Sweep:
    path, part, tokens = [*arg.split(","), "", ""][:3]
    small = grid.load(f"configs/sweeps/study_lm.py:{path}")
    kept = {name: value for name, value in small.fields.items() if not name.startswith("mixers.")}
    fields = {
        **kept,
        **{f"mixers.{name}.{key}": value for name in (*MIXERS, "full") for key, value in HEADS.items()},
        **{f"mixers.{name}.v_head_dim": 64 for name in ("kda", "gdn")},
        "mixers.mamba2.state_size": 64,
        "model.d_model": WIDTH,
        "optimizer.warmup_steps": 200,
        "eval.every_steps": 1000,
        "eval.tasks": ("passkey", "niah_single_1", "needles_requests"),
        "eval.task_lengths": (1024, 4096),
        "checkpoint.every_steps": 500,
    }
    first = [axis("mixer", "kda", "gdn"), axis("ratio", "pure", "3:1", "full"), axis("seed", 0, 1)]
    whole = [axis("mixer", *MIXERS), axis("ratio", "pure", "6:1", "3:1", "1:1", "full")]
    axes = first if part == "first" else whole
    return dataclasses.replace(small, axes=axes, fields=fields, tokens=float(tokens or 200e6))
