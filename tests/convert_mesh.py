"""Run by test_convert.py on 8 simulated devices: trains an imported model on each mesh and prints the losses.

python -m tests.convert_mesh HF_FOLDER SCRATCH
"""

import json
import sys
from pathlib import Path

import jax

from hybridlm import config as configs
from hybridlm import init_from, member, model, program, schema, sharding
from hybridlm.convert import families

MESHES = ((1, 1, 1), (2, 2, 2))


def losses(folder: Path, scratch: Path, sizes: tuple[int, ...]) -> list[list[float]]:
    """[loss, gradient norm] of three steps from the checkpoint in ``folder``."""
    config = configs.ConfigDict(families.read_config(folder).config.to_dict())
    config.model.update(dtype="float32", remat="none")
    config.data = configs.data("mqar", num_pairs=3)
    config.train.update(batch_size=8, seq_len=16, steps=3)
    config.optimizer.update(learning_rate=0.01, warmup_steps=0)
    resolved = configs.resolve(config)
    definition, source = model.build(resolved), member.build_data(resolved, "train")
    mesh = sharding.make_mesh(schema.Mesh(*sizes))
    found = []
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        built = program.build(resolved, definition, mesh, source.token_bytes)
        state = built.init(jax.random.key(0))
        state["params"] = init_from.start(str(folder), definition, state["params"], scratch)
        for index in range(3):
            state, metrics = built.step(state, sharding.put_batch(source.batch(index), mesh))
            found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return found


if __name__ == "__main__":
    places = [Path(place) for place in sys.argv[1:]]
    print(json.dumps([losses(*places, sizes) for sizes in MESHES]))
