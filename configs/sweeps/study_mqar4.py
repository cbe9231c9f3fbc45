"""The MQAR study in four layers, where it converges within minutes: six mixers, pure, 3:1, 1:1 and full.

    python -m launch.sweep --config=configs/sweeps/study_mqar4.py --dry_run

The task and the state sizes are those of study_mqar.py; Muon, with which every pattern gets past the plateau
of guessing among the values that it has seen.
"""

import dataclasses

from launch import grid
from launch.grid import Sweep, axis


def get_sweep() -> Sweep:
    deep = grid.load("configs/sweeps/study_mqar.py")
    ratios = axis("ratio", "pure", "3:1", "1:1", "full")
    fields = {**deep.fields, "model.num_layers": 4}
    del fields["optimizer.learning_rate"]
    axes = [deep.axes[0], ratios, axis("learning_rate", 3e-3, 1e-2), axis("seed", 0, 1, 2)]
    return dataclasses.replace(deep, axes=axes, fields=fields, also=())
