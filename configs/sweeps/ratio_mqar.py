"""Six runs for two CPU cores: recall rises as full layers are added.

    python -m launch.sweep --config=configs/sweeps/ratio_mqar.py
    python -m launch.sweep --config=configs/sweeps/ratio_mqar.py:deltanet --dry_run

The argument is the linear mixer. MQAR with up to 8 pairs in 32 tokens for a stack of four layers whose linear
ones keep two states of 4 x 4: without a full layer, with one and with two; two seeds.
"""

from launch.grid import Sweep, axis

SMALL = {"num_heads": 2, "head_dim": 4, "v_head_dim": 4, "conv_size": 4}


def get_sweep(mixer: str = "hgrn2") -> Sweep:
    return Sweep(
        base="configs/mqar.py",
        fields={
            "mixer": mixer,
            **{f"mixers.{mixer}.{name}": value for name, value in SMALL.items()},
            "mixers.full.num_heads": 2,
            "mixers.full.head_dim": 32,
            "model.num_layers": 4,
            "model.d_model": 64,
            "model.vocab_size": 64,
            "data.slices": "(32, 2), (32, 4), (32, 8)",
            "data.random_non_queries": False,
            "train.seq_len": 32,
            "train.batch_size": 64,
            "train.steps": 500,
            "optimizer.name": "muon",
            "optimizer.learning_rate": 1e-2,
            "optimizer.warmup_steps": 50,
            "log.every_steps": 20,
            "eval.every_steps": 100,
            "eval.batches": 4,
            "checkpoint.every_steps": 100,
        },
        axes=[axis("ratio", "pure", "3:1", "1:1"), axis("seed", 0, 1)],
        match="parameters",
        vmap=True,
    )
