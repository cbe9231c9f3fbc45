"""Six runs on two CPU cores: recall rises as full layers are added. About a minute and a half a run.

    python -m launch.sweep --config=configs/sweeps/ratio_mqar.py
    python -m launch.sweep --config=configs/sweeps/ratio_mqar.py:gla --dry_run

MQAR with more pairs than a small state of ... holds, in a stack of 8 layers: no full layer, 1, 2, 4, 8.
"""

from launch.grid import Sweep, axis


def get_sweep(mixer: str = "retnet") -> Sweep:
    return Sweep(
        base="configs/mqar.py",
        fields={
            "mixer": mixer,
            "model.num_layers": 8,
            "model.d_model": 64,
            "model.vocab_size": 128,
        },
        axes=[axis("ratio", "pure", "7:1", "3:1", "1:1", "full")],
        match="parameters",
    )
