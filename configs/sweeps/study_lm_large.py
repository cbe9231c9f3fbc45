"""The language models of study_lm.py on twenty times the text: four mixers, four ratios, attention.

    python -m launch.sweep --config=configs/sweeps/study_lm_large.py:data/source --workdir=runs/study_lm_large
    python -m launch.sweep --config=configs/sweeps/study_lm_large.py:data/source,first --workdir=...
    python -m launch.sweep --config=configs/sweeps/study_lm_large.py:data/source,places,30e6 --workdir=...
    python -m launch.sweep --config=configs/sweeps/study_lm_large.py:data/source,whole,30e6 --workdir=...

14 layers of width 512 with MLPs of 2048, about 59M parameters, 200M bytes each. Two questions come first,
which the second line runs alone: does recall rise below 3:1, and does 3:1 beat attention (pure, 3:1 and full
of kda and gated_delta_net, two seeds). The third is Gated DeltaNet with three full layers at the bottom, in
the middle, at the top and evenly spread, three seeds; the last trains on fewer bytes. Two parts go on from
there: `others`, hgrn2 and mamba2, and `seeds`, the second of kda and gated_delta_net at 6:1 and 1:1 and the
third of the rest. The same command goes on where one was stopped, run by run from its newest checkpoint.
Recall is `benchmarks.copy_recall` and `python -m eval` of the finished runs.
"""

import dataclasses

from hybridlm.errors import one_of
from launch import grid
from launch.grid import Sweep, axis

MIXERS = ("kda", "gdn", "hgrn2", "mamba2")
HEADS = {"num_heads": 8, "head_dim": 64}
PARTS = ("whole", "first", "others", "seeds", "places")
PLACES = ("0,1,2", "6,7,8", "11,12,13", "3,7,11")  # of three full layers among 14


def get_sweep(arg: str = "data/source") -> Sweep:
    path, part, tokens = [*arg.split(","), "", ""][:3]
    one_of("study_lm_large.py:PATH,PART", part or "whole", PARTS)
    small = grid.load(f"configs/sweeps/study_lm.py:{path}")
    kept = {name: value for name, value in small.fields.items() if not name.startswith("mixers.")}
    fields = {
        **kept,
        **{f"mixers.{name}.{key}": value for name in (*MIXERS, "full") for key, value in HEADS.items()},
        **{f"mixers.{name}.v_head_dim": 64 for name in ("kda", "gdn")},
        "mixers.mamba2.state_size": 64,
        "model.mlp_hidden": 2048,
        "model.remat": "auto",
        "optimizer.warmup_steps": 200,
        "eval.every_steps": 250,
        "checkpoint.every_steps": 500,
    }
    ahead = [axis("mixer", "kda", "gdn")]
    hybrid = [axis("mixer", "gdn"), axis("ratio", "3:1")]
    axes = {
        "first": [*ahead, axis("ratio", "pure", "3:1", "full"), axis("seed", 0, 1)],
        "others": [
            axis("mixer", "hgrn2", "mamba2"),
            axis("ratio", "3:1", "pure", "6:1", "1:1"),
            axis("seed", 0),
        ],
        "seeds": [*ahead, axis("ratio", "6:1", "1:1"), axis("seed", 1)],
        "places": [*hybrid, axis("placement", *PLACES), axis("seed", 0, 1, 2)],
    }.get(part, [axis("mixer", *MIXERS), axis("ratio", "pure", "6:1", "3:1", "1:1", "full")])
    third = [{"mixer": m, "ratio": r, "seed": 2} for r in ("full", "3:1", "pure") for m in ("kda", "gdn")]
    also = third if part == "seeds" else ()
    return dataclasses.replace(small, axes=axes, also=also, fields=fields, tokens=float(tokens or 200e6))
