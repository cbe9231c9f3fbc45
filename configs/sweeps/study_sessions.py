"""Accuracy by turn: three models of study_lm_large.py go on with text of sessions.

    python -m benchmarks.session_text --output text/sessions --documents 20000
    python -m hybridlm.data.prepare --input text/sessions/train.jsonl --val_input text/sessions/val.jsonl \
        --tokenizer bytes --output data/sessions
    python -m launch.sweep --config=configs/sweeps/study_sessions.py:data/sessions,runs,20e6
    python -m eval --suite=sessions --lengths=2048 --samples=200 --workdir=RUN

The second argument is where the workdirs of its parts `others` and `seeds` are, from which Mamba-2 without
full layers, at 3:1 and attention are taken; the third is bytes a run. Rows are of 4096 bytes, since sessions
have up to 2048 and what a row's end cuts off has lost its context.
"""

import dataclasses

from launch import grid
from launch.grid import Sweep, axis, zipped

STACKS = (
    ("mamba2", "3:1", "others/mamba2_3-1_seed0"),
    ("full", "full", "seeds/full_full_seed2"),
    ("mamba2", "pure", "others/mamba2_pure_seed0"),
)


def get_sweep(arg: str = "data/sessions,runs") -> Sweep:
    path, runs, tokens = [*arg.split(","), "", ""][:3]
    large = grid.load(f"configs/sweeps/study_lm_large.py:{path},seeds")
    mixers, ratios, names = zip(*STACKS, strict=True)
    start = [("taught", {"init_from": f"{runs or 'runs'}/{name}"}) for name in names]
    fields = {**large.fields, "train.seq_len": 4096, "train.batch_size": 8, "optimizer.warmup_steps": 50}
    axes = [zipped(axis("mixer", *mixers), axis("ratio", *ratios), axis("start", *start))]
    return dataclasses.replace(large, axes=axes, also=(), fields=fields, tokens=float(tokens or 20e6))
