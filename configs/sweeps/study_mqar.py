"""Recall against the share of full layers: six linear mixers, six ratios, three seeds, and three placements.

    python -m launch.sweep --config=configs/sweeps/study_mqar.py --dry_run

MQAR with 2, 4 and 8 pairs in 32 tokens of 64 ids, a third of the rows each as in the mixtures of the papers,
where the easy ones teach. A linear layer's state is two heads of 4 x 4, so that a delta rule can keep four
orthogonal keys a head. 14 layers of width 64: 12:1 has a full layer, 6:1 two, 3:1 three and 1:1 seven; two of
them stand at the end of each period, or both at the bottom, in the middle or at the top. MLPs make up for
what mixers differ in parameters. Every linear mixer has a short convolution of 4, also those that their
papers give none, since MQAR needs a token's neighbour. Muon at one learning rate for all, between the two
that study_mqar4.py tries in four layers.
"""

from launch.grid import Sweep, axis

MIXERS = ("kda", "gdn", "deltanet", "gla", "hgrn2", "retnet")
PLACEMENTS = ("0,1", "6,7", "12,13")
SMALL = {"num_heads": 2, "head_dim": 4, "v_head_dim": 4, "conv_size": 4}


def get_sweep() -> Sweep:
    fields = {f"mixers.{mixer}.{name}": value for mixer in MIXERS for name, value in SMALL.items()}
    return Sweep(
        base="configs/mqar.py",
        fields={
            **fields,
            "mixers.full.num_heads": 2,
            "mixers.full.head_dim": 32,
            "model.num_layers": 14,
            "model.d_model": 64,
            "model.vocab_size": 64,
            "data.slices": "(32, 2), (32, 4), (32, 8)",
            "data.random_non_queries": False,
            "train.seq_len": 32,
            "train.batch_size": 64,
            "train.steps": 1000,
            "optimizer.name": "muon",
            "optimizer.learning_rate": 5e-3,
            "optimizer.warmup_steps": 50,
            "eval.every_steps": 50,
            "eval.batches": 4,
            "log.every_steps": 50,
            "checkpoint.every_steps": 0,
        },
        axes=[
            axis("mixer", *MIXERS),
            axis("ratio", "pure", "12:1", "6:1", "3:1", "1:1", "full"),
            axis("seed", 0, 1, 2),
        ],
        also=[{"mixer": m, "ratio": "6:1", "placement": p} for m in MIXERS for p in PLACEMENTS],
        match="parameters",
        vmap=True,
    )
