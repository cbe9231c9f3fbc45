"""Conversions of one Transformer: four mixers, three ratios, a fifth of the tokens that made it.

    python -m launch.sweep --config=configs/sweeps/study_linearise.py:runs/teacher --workdir=runs/linearise
    python -m launch.sweep --config=configs/sweeps/study_linearise.py:runs/teacher,seeds --workdir=runs/seeds
    python -m launch.sweep --config=configs/sweeps/study_linearise.py:runs/teacher,0+1+7 --workdir=runs/chosen

The second line is two more seeds of all but KDA, pure and 3:1; the third Gated DeltaNet with those layers
full (`python -m hybridlm.layer_choice` names some), three seeds, to hold against 3:1. The argument is the
teacher's workdir, whose batches, widths and text the conversions have, and a fifth of whose steps: one in a
hundred in which each new mixer learns its attention's outputs (Hedgehog's maps: its weights), then the KL of
the logits. `gla+swa` is Liger's layer, gated linear attention of gates made of keys beside a window of 64;
`featuremap` is Hedgehog.
"""

from typing import Any

from hybridlm import init_from
from hybridlm.errors import ConfigError
from launch.grid import Sweep, axis, zipped

LIGER = {"init_gates": "keys", "mixers.swa.window": 64}
HEDGEHOG = {
    "mixers.featuremap.feature_map": "hedgehog",
    "mixers.featuremap.output_norm": False,
    "stages.transfer.objective.transfer": 0.0,
    "stages.transfer.objective.weights": 1.0,
    "stages.transfer.optimizer.freeze": "*, !*_maps.*",
}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gdn": ("delta", {}),
    "kda": ("channels", {}),
    "gla+swa": ("liger", LIGER),
    "featuremap": ("hedgehog", HEDGEHOG),
}


def get_sweep(arg: str = "runs/teacher") -> Sweep:
    teacher, _, part = arg.partition(",")
    if part not in ("", "seeds") and not all(one.isdigit() for one in part.split("+")):
        problem = "the part after the teacher is none, seeds, or indices of layers to keep such as 0+1+7"
        raise ConfigError("--config", f"study_linearise.py:{arg}", problem)
    steps = init_from.described(teacher).train.steps // 5
    if steps < 20:
        problem = f"a fifth of the teacher's steps is {steps}; at least 20 are needed, one in 20 for transfer"
        raise ConfigError("--config", f"study_linearise.py:{arg}", problem)
    transfer = steps // 20
    mixers = lambda *names: zipped(
        axis("mixer", *names), axis("recipe", **{RECIPES[name][0]: RECIPES[name][1] for name in names})
    )
    grid = [mixers(*RECIPES), axis("ratio", "pure", "3:1", "1:1")]
    seeds = [mixers("gdn", "gla+swa", "featuremap"), axis("ratio", "pure", "3:1"), axis("seed", 1, 2)]
    chosen = [axis("mixer", "gdn"), axis("ratio", part), axis("seed", 0, 1, 2)]
    return Sweep(
        base=f"configs/linearise.py:teacher={teacher},{{mixer}},{{ratio}}",
        axes={"": grid, "seeds": seeds}.get(part, chosen),
        fields={
            "stages.order": "transfer,distil",
            "stages.transfer.train.steps": transfer,
            "stages.transfer.optimizer.learning_rate": 2e-3,
            "stages.distil.train.steps": steps - transfer,
            "model.remat": "most",  # 15 GiB of an H100 for 3:1, so that several share one
            "optimizer.learning_rate": 5e-4,
            "optimizer.warmup_steps": 10,
            "eval.every_steps": transfer,
            "eval.batches": 8,
            "log.every_steps": 10,
            "checkpoint.every_steps": 0,
        },
    )
