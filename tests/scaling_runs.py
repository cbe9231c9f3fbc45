"""Run by test_scaling.py on 8 simulated devices: prints as JSON what the tests there look at."""

import json
import logging
import shutil
import sys
from pathlib import Path

from benchmarks import scaling
from hybridlm import config as configs
from hybridlm import trainer
from tests import tiny

STEPS, SAVED = 6, 3


def resumed(folder: Path) -> dict[str, list[float]]:
    """Losses of a run on 8 devices, and of that run resumed after step 3 on 2 and on 1."""
    text = tiny.write_text(folder)

    def train(name: str, devices: int) -> list[float]:
        mesh = {"mesh__data": 1, "mesh__fsdp": devices}
        config = tiny.config(text, model__pattern="retnet", checkpoint__every_steps=SAVED, **mesh)
        trainer.train(configs.resolve(config), folder / name)
        return [line["loss"] for line in tiny.lines(folder / name)]

    losses = {"8": train("eight", 8)}
    for devices in (2, 1):
        shutil.copytree(folder / "eight", folder / str(devices))
        shutil.rmtree(folder / str(devices) / "checkpoints" / str(STEPS))
        losses[str(devices)] = train(str(devices), devices)
    return losses


if __name__ == "__main__":
    logging.getLogger("hybridlm").setLevel(logging.ERROR)
    folder = Path(sys.argv[1])
    config = configs.resolve(tiny.config(tiny.write_text(folder), model__pattern="retnet"))
    wanted = scaling.keys([4], ["fsdp+tensor", "fsdp+context"], check=2)
    rows = scaling.compare({key: scaling.run(config, key, rows=2, steps=2, check=2) for key in wanted})
    print(json.dumps({"rows": rows, "losses": resumed(folder)}))
