"""A training step set aside because it went wrong, and again: python -m hybridlm.run.replay runs/x/dump-120

A dump holds config.json, the state before the step as a checkpoint, and the batch. It needs neither the data
nor the devices of the run.
"""

import argparse
import shutil
import sys
from pathlib import Path

import jax
import numpy as np

from hybridlm import config as configs
from hybridlm import config_file, init_from, model, program, schema, sharding, untrusted
from hybridlm.config import Config
from hybridlm.errors import ConfigError
from hybridlm.run import checkpoint, cli, processes, watch


def dump(path: Path, config: Config, step: int, state: program.State, batch: dict[str, np.ndarray]) -> None:
    """Writes what ``step`` was made of; every process calls it.

    state: before the step, by canonical names.  batch: the whole of it, as process 0 has it from the data.
    """
    if jax.process_index() == 0 and path.exists():
        shutil.rmtree(path)  # of an earlier start that came to the same step
    processes.barrier("dump")
    with checkpoint.Checkpoints(path / "checkpoints") as saves:
        saves.save(step, state, {"step": step})
    if jax.process_index() == 0:
        untrusted.write_text(path / "config.json", configs.to_json(config))
        np.savez(path / "batch.npz", **batch)  # type: ignore[arg-type]


def replay(path: Path) -> tuple[int, dict[str, float], dict[str, float]]:
    """(step, its metrics, squared gradient norm of each parameter from the loss down).

    On the mesh of the config if this machine has as many devices, else on one.
    """
    config = configs.resolve(config_file.from_json(path / "config.json"))
    batch = read_batch(path / "batch.npz")
    definition = model.build(config)
    try:
        mesh = sharding.make_mesh(config.mesh)
        configs.check_batch(config.train, mesh.shape)
    except ConfigError:
        mesh = sharding.make_mesh(schema.Mesh(data=1))
    with jax.set_mesh(mesh), checkpoint.Checkpoints(path / "checkpoints") as saves:
        built = program.build(config, definition, mesh, None)
        if not saves.steps():
            fix = "Its run was killed while it wrote it."
            raise ConfigError("DUMP", str(path), "holds no checkpoint", fix)
        step = saves.steps()[-1]
        _, join, like = program.by_layer(definition, built)
        state = join(saves.restore(step, like))
        teacher = init_from.teacher(config, built)
        metrics = jax.device_get(built.step(state, sharding.put_batch(batch, mesh), *teacher)[1])
    squares = watch.by_parameter(metrics.pop(program.NORMS), definition)
    return step, {name: float(value) for name, value in metrics.items()}, squares


def read_batch(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a dump's batch; ConfigError for a file that is missing or damaged."""
    untrusted.regular(path, "DUMP")
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # whatever a zip file, its compression or NumPy's header can be damaged to
        problem = f"is no batch of a dump ({type(error).__name__}: {error})"
        raise ConfigError("DUMP", str(path), problem) from error


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m hybridlm.run.replay", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("dump", type=Path, help="the folder that the run named")
    path = parser.parse_args(argv).dump
    return cli.run(lambda: show(path))


def show(path: Path) -> None:
    step, metrics, squares = replay(path)
    print(f"step {step}: " + ", ".join(f"{name} {value:.6g}" for name, value in metrics.items()))
    print("gradient norms, from the loss down:")
    for name, square in squares.items():
        print(f"  {name:<48} {square**0.5:.6g}")
    print(f"first that is not finite: {watch.first_not_finite(squares)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
