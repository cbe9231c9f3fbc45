"""Loss of byte-level language models against the share of full layers: six linear mixers, six ratios.

    python -m launch.sweep --config=configs/sweeps/study_lm.py:data/source --workdir=runs/study_lm
    python -m launch.sweep --config=configs/sweeps/study_lm.py:data/source,later --workdir=runs/study_lm_later

The second line is four kinds that came later, pure and 3:1. The argument is a folder of shards that `python
-m hybridlm.data.prepare` wrote. 14 layers of width 512, about 48M parameters, matched through the MLPs; every
run sees the same bytes in the same order. One learning rate for all: on other text attention learned faster
with it than with twice as much.
"""

from hybridlm.errors import one_of
from launch.grid import Sweep, axis

MIXERS = ("kda", "gdn", "deltanet", "gla", "hgrn2", "retnet")
LATER = ("rwkv7", "gdp", "mlstm", "mamba2")
HEADS = {"num_heads": 8, "head_dim": 64}


def get_sweep(arg: str = "data/source") -> Sweep:
    path, _, later = arg.partition(",")
    if later:
        one_of("study_lm.py:PATH,PART", later, ("later",))
    mixers = LATER if later else MIXERS
    values = [name for name in mixers if name not in ("rwkv7", "mamba2")]  # which have a v_head_dim
    more = {"mixers.mamba2.state_size": 64, "model.remat": "full"} if later else {}
    ratios = ("pure", "3:1") if later else ("pure", "12:1", "6:1", "3:1", "1:1", "full")
    return Sweep(
        base="configs/quickstart.py",
        fields={
            **{f"mixers.{name}.{key}": value for name in (*mixers, "full") for key, value in HEADS.items()},
            **{f"mixers.{name}.v_head_dim": 64 for name in values},
            **more,
            "data.kind": "shards",
            "data.path": path,
            "model.num_layers": 14,
            "model.d_model": 512,
            "model.dtype": "bfloat16",
            "train.seq_len": 1024,
            "train.batch_size": 32,
            "optimizer.name": "adamw",
            "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": 50,
            "eval.every_steps": 80,
            "eval.batches": 16,
            "eval.sample_tokens": 0,
            "log.every_steps": 16,
            "checkpoint.every_steps": 0,
        },
        axes=[axis("mixer", *mixers), axis("ratio", *ratios)],
        match="parameters",
        tokens=10 * 2**20,
    )
