"""Joint recall (HAX, arXiv 2507.00449) in two layers: linear stacks, attention, and one of each.

    python -m launch.sweep --config=configs/sweeps/joint_recall.py --workdir=runs/joint_recall

8 contexts of 8 keys, 274 tokens, 16 values, so guessing gets 0.0625. Width 64, no MLP, two heads; a linear
layer keeps 2 x 16 x 16 numbers, fewer slots than the 64 pairs, so by itself it should fail, and a linear
layer below attention solve it (the last context is a state, the pair a look-up). Every layer has a short
convolution of 4.
"""

from launch.grid import Sweep, axis

LINEAR = ("mamba2", "gdn", "kda")
SMALL = {"num_heads": 2, "head_dim": 16, "conv_size": 4}


def get_sweep() -> Sweep:
    stacks = (*(f"{name}/none" for name in (*LINEAR, "full")), *(f"{name}/none full/none" for name in LINEAR))
    return Sweep(
        base="configs/synthetic.py:joint_recall,{stack}",
        fields={
            **{f"mixers.{mixer}.{name}": value for mixer in LINEAR for name, value in SMALL.items()},
            "mixers.gdn.v_head_dim": 16,
            "mixers.kda.v_head_dim": 16,
            "mixers.mamba2.state_size": 16,
            "mixers.full.kind": "benchmarks.conv_attention:Mixer",
            "mixers.full.num_heads": 2,
            "mixers.full.head_dim": 16,
            "model.d_model": 64,
            "model.tie_embeddings": True,
            "train.batch_size": 64,
            "train.steps": 4000,
            "optimizer.b2": 0.95,
            "eval.every_steps": 200,
            "eval.batches": 8,
            "checkpoint.every_steps": 0,
        },
        axes=[axis("stack", *stacks), axis("learning_rate", 1e-3, 3e-3), axis("seed", 0, 1, 2)],
        vmap=True,
    )
