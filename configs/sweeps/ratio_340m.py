"""The 340M grid of "A Systematic Analysis of Hybrid Linear Attention" (2507.06457): 5 ratios x 6 mixers.

    python -m launch.sweep --config=configs/sweeps/ratio_340m.py --dry_run --device=H100
    python -m launch.sweep --config=configs/sweeps/ratio_340m.py --launcher=slurm --engine partition=gpu

20B tokens a run, and the transformer beside them. Which layers a ratio stands for, and how parameters are
matched, is said in configs/hybrid.py; a GPU node of 8 shards each run (mesh.fsdp=-1).
"""

from launch.grid import Sweep, axis


def get_sweep() -> Sweep:
    return Sweep(
        base="configs/hybrid.py:340m,{mixer},{ratio}",
        axes=[
            axis("mixer", "hgrn", "retnet", "gla", "hgrn2", "deltanet", "gdn"),
            axis("ratio", "24:1", "12:1", "6:1", "3:1", "pure"),
        ],
        also=[{"mixer": "full", "ratio": "pure"}],
        tokens=20e9,
    )
