"""Which layers should stay full: python -m hybridlm.layer_choice runs/pure --keep=6

Of a run that `configs/linearise.py` made: each of its new layers is put alone in the teacher's place, and the
model's held-out loss says what that costs (the static score of HALO, arXiv 2601.22156, and of KL-LS, arXiv
2512.20569, before their own training). The layers that cost most are to stay; the result is a pattern.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich
from rich.table import Table

from hybridlm import init_from, member, model, plan, untrusted, weights
from hybridlm.errors import ConfigError
from hybridlm.objectives import next_token
from hybridlm.run import cli, logbook


def alone(
    teacher: model.Definition, student: model.Definition, layer: int | None
) -> tuple[model.Definition, dict[str, bool]]:
    """(the teacher with the student's ``layer``, None: as it is; name -> whether that is the student's)."""
    specs = list(teacher.layers)
    if layer is not None:
        specs[layer] = student.layers[layer]._replace(frozen=())
    layers = tuple(specs)
    settings = dataclasses.replace(student.model, remat="none")
    definition = model.Definition(settings, layers, plan.plan(layers))
    own = (f"layers.{layer}.", "shared.")
    return definition, {name: name.startswith(own) for name in model.canonical_shapes(definition)}


def loss_of(definition: model.Definition, flat: Mapping[str, Any], batches: Sequence[Any]) -> float:
    """Nats per token; ``flat``: parameters by canonical name."""
    objective = next_token.Objective(next_token.Config(kind="next_token"), definition)

    @jax.jit
    def sums(flat: Mapping[str, Any], batch: Any) -> tuple[jax.Array, jax.Array]:
        found = objective.evaluate(model.restack(definition, dict(flat)), {}, batch)
        return found["loss_sum"], found["tokens"]

    total, tokens = np.sum([jax.device_get(sums(flat, batch)) for batch in batches], axis=0)
    return float(total / tokens)


def rank(workdir: Path, batches: int) -> tuple[float, dict[int, float], Any]:
    """(the teacher's held-out loss, what each new layer alone makes of it, the run's `weights.Weights`)."""
    run = weights.load(workdir)
    path = run.config.init_from
    if not path:
        fix = "Name a run of configs/linearise.py."
        raise ConfigError("--workdir", str(workdir), "was not made from another model (init_from)", fix)
    data = member.build_data(run.config, "val")
    held_out = [data.batch(i) for i in range(min(batches, data.num_batches or batches))]
    ours = model.unstack(run.definition, run.params)
    with init_from.source(path) as other:
        teacher = other.definition
        pairs = list(zip(teacher.layers, run.definition.layers, strict=True))
        changed = [i for i, (one, new) in enumerate(pairs) if one.config != new.config]
        if not changed:
            raise ConfigError("--workdir", str(workdir), "has every layer of the model that it came from")
        theirs = {name: np.asarray(array) for name, array in other.arrays.items()}
    found: dict[int | None, float] = {}
    for layer in (None, *changed):
        definition, own = alone(teacher, run.definition, layer)
        flat = {name: ours[name] if is_own else theirs[name] for name, is_own in own.items()}
        found[layer] = loss_of(definition, flat, held_out)
    base = found.pop(None)
    return base, {layer: loss for layer, loss in found.items() if layer is not None}, run


def ranked(losses: Mapping[int, float]) -> list[int]:
    """Layers, what costs most first: what breaks the model, a loss that is not finite, before all others."""
    return sorted(losses, key=lambda layer: (not math.isfinite(losses[layer]), losses[layer]), reverse=True)


def chosen(run: weights.Weights, losses: Mapping[int, float], keep: int, teacher: model.Definition) -> str:
    """The pattern that keeps the ``keep`` layers that cost most, beside those that the run has kept."""
    worst = ranked(losses)[:keep]
    specs = run.definition.layers
    return str(plan.plan([teacher.layers[i].name if i in worst else one.name for i, one in enumerate(specs)]))


def show(workdir: Path, keep: int, batches: int) -> None:
    base, losses, run = rank(workdir, batches)
    if not 0 < keep <= len(losses):
        raise ConfigError(
            "--keep", keep, f"must be between 1 and {len(losses)}, the layers that were replaced"
        )
    pattern = chosen(run, losses, keep, model.build(init_from.described(run.config.init_from)))
    table = Table("rank", "layer", "loss, that layer alone replaced", "above the teacher")
    order = ranked(losses)
    for place, layer in enumerate(order, 1):
        table.add_row(str(place), str(layer), f"{losses[layer]:.4f}", f"{losses[layer] - base:+.4f}")
    rich.get_console().print(table)
    kept = "+".join(map(str, sorted(order[:keep])))
    print(f"teacher: {base:.4f} nats per token\nkeep {kept}: --config.model.pattern={pattern!r}")
    found, _ = logbook.recordable({str(i): losses[i] for i in order})
    record = {"teacher": base, "losses": found, "keep": kept, "pattern": pattern}
    with cli.stored(workdir, "What was found stands above."):
        untrusted.write_json(workdir / "layer_choice.json", record)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m hybridlm.layer_choice", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("workdir", type=Path, help="of the converted run, all of its layers replaced or some")
    parser.add_argument("--keep", type=int, required=True, help="layers that are to stay full")
    parser.add_argument("--batches", type=int, default=16, help="held-out batches; default: %(default)s")
    flags = parser.parse_args(argv)
    return cli.run(lambda: show(flags.workdir, flags.keep, flags.batches))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
