"""The parameters of a run, as its checkpoints have them."""

from pathlib import Path
from typing import NamedTuple

import jax

from hybridlm import config as configs
from hybridlm import model
from hybridlm.config import Config
from hybridlm.errors import ConfigError
from hybridlm.run import checkpoint


class Weights(NamedTuple):
    """A run's model at ``step``."""

    config: Config
    definition: model.Definition
    params: model.Params
    step: int


def load(workdir: str | Path, step: int | None = None, **changes: str) -> Weights:
    """The run in ``workdir`` at ``step`` (None: its newest checkpoint), on one device.

    changes: to the config, such as model__dtype="float32". ConfigError where there is no such checkpoint.
    """
    workdir = Path(workdir).absolute()
    config = configs.of_run(workdir).replace(**changes)
    definition = model.build(config)
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError("--workdir", str(workdir), "holds no checkpoints", "Train the run first.")
    with checkpoint.Checkpoints(workdir / "checkpoints") as saves:
        steps = saves.steps()
        if not steps or (step is not None and step not in steps):
            allowed = "there are checkpoints at steps " + (", ".join(map(str, steps)) or "(none)")
            raise ConfigError("--step", step, allowed)
        step = steps[-1] if step is None else step
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        like = jax.tree.map(place, model.canonical_shapes(definition))
        flat = saves.restore(step, {"params": like})["params"]
    return Weights(config, definition, jax.jit(lambda flat: model.restack(definition, flat))(flat), step)
