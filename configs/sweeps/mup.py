"""Whether the best learning rate carries over widths: the quickstart's layers, without muP and with it.

    python -m launch.sweep --config=configs/sweeps/mup.py --dry_run

The rates of a width are one program and read the same batches. At the base width both are one.
"""

from launch.grid import Sweep, axis

BASE = 256


def get_sweep() -> Sweep:
    return Sweep(
        base="configs/quickstart.py",
        fields={
            "optimizer.name": "adamw",
            "optimizer.warmup_steps": 37,
            "eval.every_steps": 0,
            "eval.sample_tokens": 0,
            "checkpoint.every_steps": 0,
        },
        axes=[
            axis("model.mup_base_width", 0, BASE),
            axis("model.d_model", 256, 512, 1024),
            axis("learning_rate", *(2.0**-n for n in range(11, 4, -1))),
        ],
        keep=lambda point: point["model.mup_base_width"] != point["model.d_model"],
        vmap=True,
    )
