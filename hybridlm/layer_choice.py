"""Which layers should stay full: python -m hybridlm.layer_choice runs/pure --keep=6

Of a run that `configs/linearise.py` made: each of its new layers is put alone in the teacher's place, and the
model's held-out loss says what that costs (the static score of HALO, arXiv 2601.22156, and of KL-LS, arXiv
2512.20569, before their own training). The layers that cost most are to stay; the result is a
table, a picture (layer_choice.png) and a pattern.
Of a run whose layers have both (teacher=DIR,gdn,gates) the learned gates say which, and nothing is run
(FlashMorph, arXiv 2606.30562, with the KL for its distance of hidden states).
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

from hybridlm import config as configs
from hybridlm import init_from, member, model, plan, untrusted, weights
from hybridlm.block import Spec
from hybridlm.errors import ConfigError
from hybridlm.mixers import parallel
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


def origin(config: configs.Config) -> str:
    """Of the model whose layers were replaced: the teacher's, or else what the parameters came from."""
    return str(getattr(config.objective, "teacher", "")) or config.init_from


def rank(run: weights.Weights, workdir: Path, batches: int) -> tuple[float, dict[int, float]]:
    """(the teacher's held-out loss, what each new layer of the run alone makes of it)."""
    data = member.build_data(run.config, "val")
    held_out = [data.batch(i) for i in range(min(batches, data.num_batches or batches))]
    ours = model.unstack(run.definition, run.params)
    with init_from.source(origin(run.config)) as other:
        teacher = other.definition
        pairs = list(zip(teacher.layers, run.definition.layers, strict=True))
        changed = [i for i, (one, new) in enumerate(pairs) if one.config != new.config]
        if not changed:
            raise ConfigError("--workdir", str(workdir), "has every layer of the model that it came from")
        theirs = {name: np.asarray(array) for name, array in other.arrays.items()}

    def loss(layer: int | None) -> float:
        definition, own = alone(teacher, run.definition, layer)
        flat = {name: ours[name] if is_own else theirs[name] for name, is_own in own.items()}
        return loss_of(definition, flat, held_out)

    return loss(None), {layer: loss(layer) for layer in changed}


def ranked(losses: Mapping[int, float]) -> list[int]:
    """Layers, what costs most first: what breaks the model, a loss that is not finite, before all others."""
    return sorted(losses, key=lambda layer: (not math.isfinite(losses[layer]), losses[layer]), reverse=True)


def gates(run: weights.Weights) -> dict[int, float]:
    """The learned share of attention of each layer of a run that has both (``teacher=DIR,gdn,gates``)."""
    flat = model.unstack(run.definition, run.params)
    found = {i: flat.get(f"layers.{i}.mixer.gate") for i in range(len(run.definition.layers))}
    return {i: float(jax.nn.sigmoid(gate[0])) for i, gate in found.items() if gate is not None}


def kept(scores: Mapping[int, float], costs: Mapping[int, float], budget: float) -> list[int]:
    """Layers to keep, the highest ``scores`` first, each that still fits: ``costs`` add up to ``budget`` at
    most."""
    found, left = [], budget
    for layer in ranked(scores):
        if costs[layer] <= left:
            found.append(layer)
            left -= costs[layer]
    return found


def without_attention(spec: Spec) -> Spec:
    """``spec``, of a layer that has both the other of its branches."""
    config = spec.config
    if not isinstance(config, parallel.Joined) or config.combine != "gate":
        return spec
    return spec._replace(name=spec.name.replace(spec.mixer, config.branches[1], 1), config=config.parts[1])


def names(run: weights.Weights, teacher: model.Definition, layers: Sequence[int]) -> list[str]:
    """The pattern's items with ``layers`` as the teacher has them, and no layer that has both."""
    pairs = enumerate(zip(run.definition.layers, teacher.layers, strict=True))
    return [(theirs if i in layers else without_attention(ours)).name for i, (ours, theirs) in pairs]


def kv_bytes(run: weights.Weights, teacher: model.Definition, context: int) -> tuple[float, dict[int, float]]:
    """(of a row of ``context`` tokens with every layer replaced, what keeping each adds)."""
    size = run.definition.dtype.itemsize
    cache = lambda spec: spec.cost(teacher.d_model, context).cache * size
    own = [cache(without_attention(spec)) for spec in run.definition.layers]
    return sum(own, 0.0), {i: cache(spec) - own[i] for i, spec in enumerate(teacher.layers)}


def draw(scores: Mapping[int, float], keep: Sequence[int], base: float | None, path: Path) -> None:
    """A bar for each layer that was replaced, those to keep in colour, as a PNG. A score that is not finite
    has a cross at the top."""
    from matplotlib.figure import Figure  # slow to import; a bare Figure draws with Agg

    figure = Figure(figsize=(6, 3), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for layer, score in sorted(scores.items()):
        colour = "#0072B2" if layer in keep else "0.7"
        if math.isfinite(score):
            axes.bar(layer, score - (base or 0), color=colour)
        else:
            axes.plot(layer, 0.95, "x", color=colour, transform=axes.get_xaxis_transform())
    axes.set_xticks(sorted(scores))
    axes.set_xlabel("layer (in colour: to keep)")
    alone = "loss above the teacher (nats per token),\nthat layer alone replaced"
    axes.set_ylabel("share of attention, learned" if base is None else alone)
    figure.savefig(path)


def show(workdir: Path, keep: int = 0, batches: int = 16, budget: float = 0, context: int = 0) -> None:
    """keep: as many layers; budget: as many as its bytes of keys and values at ``context`` tokens allow."""
    run = weights.load(workdir)
    if not origin(run.config):
        fix = "Name a run of configs/linearise.py."
        raise ConfigError("--workdir", str(workdir), "was not made from another model (init_from)", fix)
    teacher = model.build(init_from.described(origin(run.config)))
    sizes = [(one.d_model, len(one.layers)) for one in (teacher, run.definition)]
    if sizes[0] != sizes[1]:
        problem = f"has (d_model, layers) {sizes[1]}, the model that it came from {sizes[0]}"
        raise ConfigError("--workdir", str(workdir), problem, "Both must be equal for layers to be compared.")
    base: float | None = None
    scores = shares = gates(run)
    if not shares:
        base, scores = rank(run, workdir, batches)
    context = context or run.config.train.seq_len
    least, costs = kv_bytes(run, teacher, context)
    if budget:
        if budget < least:
            problem = f"is less than the {least:,.0f} that are kept with every layer replaced"
            raise ConfigError("--kv_bytes", budget, problem)
        found = kept(scores, costs, budget - least)
    else:
        if not 0 < keep <= len(scores):
            problem = f"must be between 1 and {len(scores)}, the layers that were replaced"
            raise ConfigError("--keep", keep, problem)
        found = ranked(scores)[:keep]
    told = "share of attention, learned" if shares else "loss, that layer alone replaced"
    table = Table("rank", "layer", told, *([] if shares else ["above the teacher"]))
    order = ranked(scores)
    for place, layer in enumerate(order, 1):
        above = [] if base is None else [f"{scores[layer] - base:+.4f}"]
        table.add_row(str(place), str(layer), f"{scores[layer]:.4f}", *above)
    rich.get_console().print(table)
    pattern = str(plan.plan(names(run, teacher, found)))
    total = least + sum(costs[i] for i in found)
    whole = [i for i, spec in enumerate(teacher.layers) if spec.config.full_attention and i not in scores]
    said = "+".join(map(str, sorted([*found, *whole])))  # with those that the run has kept, as RATIO
    print(f"teacher: {base:.4f} nats per token" if base is not None else "gates of both in every layer")
    print(f"keep {said or 'none'}: {total:,.0f} bytes of keys and values a row of {context} tokens")
    print(f"--config.model.pattern={pattern!r}")
    recorded, _ = logbook.recordable({str(i): scores[i] for i in order})
    record: dict[str, Any] = {"losses" if base is not None else "gates": recorded}
    record |= {"teacher": base, "keep": said, "pattern": pattern, "kv_bytes": total, "context": context}
    with cli.stored(workdir, "What was found stands above."):
        untrusted.write_json(workdir / "layer_choice.json", record)
        draw(scores, found, base, workdir / "layer_choice.png")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m hybridlm.layer_choice", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("workdir", type=Path, help="of the converted run, all of its layers replaced or some")
    many = parser.add_mutually_exclusive_group(required=True)
    many.add_argument("--keep", type=int, default=0, help="layers that are to stay full")
    many.add_argument("--kv_bytes", type=float, default=0, help="that keys and values of a row may take")
    parser.add_argument("--context", type=int, default=0, help="tokens of that row; default: train.seq_len")
    parser.add_argument("--batches", type=int, default=16, help="held-out batches; default: %(default)s")
    flags = parser.parse_args(argv)
    return cli.run(lambda: show(flags.workdir, flags.keep, flags.batches, flags.kv_bytes, flags.context))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
