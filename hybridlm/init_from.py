"""Starting a run from another's parameters: a workdir's newest checkpoint, or a Hugging Face folder.

Layers are mapped by index, and inside a layer parameters by name; a mixer's or an MLP's only where the kind
is the same, any only where the shape is. What finds no counterpart keeps its fresh value and is reported as
new; what nobody takes is reported as dropped.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import config as configs
from hybridlm import layered, model
from hybridlm.convert import transfer
from hybridlm.errors import ConfigError
from hybridlm.run import checkpoint

log = logging.getLogger("hybridlm")


class Source(NamedTuple):
    """Another model: its definition, and its parameters by canonical name, anything that NumPy can read.

    carry: brings what an import or export needs to know of a public checkpoint into a workdir.
    """

    definition: model.Definition
    arrays: Mapping[str, Any]
    carry: Callable[[Path], None]


class Report(NamedTuple):
    """Canonical names. loaded: taken over; new: fresh; dropped: of the source, not taken."""

    loaded: list[str]
    new: list[str]
    dropped: list[str]

    def lines(self) -> list[str]:
        """Per part of the model, layers by index, what became of it."""
        parts: dict[str, dict[str, list[str]]] = {}
        for kind, names in self._asdict().items():
            for name in names:
                layer = name.startswith("layers.")
                part, rest = (name.split(".", 2)[1], name.split(".", 2)[2]) if layer else (name, "")
                parts.setdefault(f"layer {part}" if layer else part, {}).setdefault(kind, []).append(rest)
        return [
            f"{part}: "
            + "; ".join(_said(kind, names, whole=len(kinds) == 1) for kind, names in kinds.items())
            for part, kinds in parts.items()
        ]


def _said(kind: str, names: list[str], whole: bool) -> str:
    return kind if whole else f"{kind} {', '.join(names)}"


def check(path: str | Path) -> None:
    """ConfigError unless there is a model at ``path``, its config readable; opens no array."""
    path = Path(path).absolute()
    if (path / "checkpoints").is_dir():
        configs.resolve(configs.from_json(path / "config.json"))
    elif (path / transfer.CONFIG).is_file():
        transfer.read_config(path)
    else:
        problem = "is neither a workdir with checkpoints nor a Hugging Face folder"
        raise ConfigError("init_from", str(path), problem)


@contextlib.contextmanager
def source(path: str | Path) -> Iterator[Source]:
    """The model at ``path``."""
    check(path)
    path = Path(path).absolute()
    if (path / "checkpoints").is_dir():
        definition = model.build(configs.resolve(configs.from_json(path / "config.json")))
        with checkpoint.Checkpoints(path / "checkpoints") as saves:
            steps = saves.steps()
            if not steps:
                raise ConfigError("init_from", str(path), "has no checkpoint")
            stacks = saves.open(steps[-1], "params", checkpoint.flatten(model.shapes(definition)))
            entries = layered.entries(definition).items()
            arrays: dict[str, Any] = {name: stacks[entry.path][entry.place] for name, entry in entries}
            yield Source(definition, arrays, lambda workdir: _copy(path / transfer.CARRIED, workdir))
    else:
        imported = transfer.read_config(path)
        definition = model.build(imported.config)
        names = {(entry.path, entry.place): name for name, entry in layered.entries(definition).items()}
        arrays = {}
        manifest = transfer.fill(
            path, imported, lambda entry, array: arrays.update({names[entry[:2]]: array})
        )
        yield Source(definition, arrays, lambda workdir: transfer.carry(imported, manifest, workdir))


def _copy(carried: Path, workdir: Path) -> None:
    if carried.is_dir():
        shutil.copytree(carried, workdir / carried.name, dirs_exist_ok=True)


def load(other: Source, definition: model.Definition, params: model.Params) -> tuple[model.Params, Report]:
    """``params`` (fresh, wherever they lie) with everything replaced that has a counterpart in ``other``."""
    entries = layered.entries(definition)
    taken = [
        name
        for name, entry in entries.items()
        if name in other.arrays
        and tuple(other.arrays[name].shape) == entry.shape
        and _same_kind(name, definition, other.definition)
    ]
    by_path: dict[str, list[str]] = {}
    for name in taken:
        by_path.setdefault(entries[name].path, []).append(name)
    leaves = checkpoint.flatten(params)
    for path, names in by_path.items():
        leaf = leaves[path]
        loaded, present = np.zeros(leaf.shape, np.float32), np.zeros(leaf.shape, bool)
        for name in names:
            loaded[entries[name].place] = np.asarray(other.arrays[name])
            present[entries[name].place] = True
        leaves[path] = loaded_leaf(leaf, loaded, present)
    new = [name for name in entries if name not in taken]
    report = Report(taken, new, [name for name in other.arrays if name not in taken])
    return checkpoint.unflatten(params, leaves), report


def loaded_leaf(leaf: jax.Array, loaded: np.ndarray, present: np.ndarray) -> jax.Array:
    """``leaf`` with the ``present`` elements taken from ``loaded``, sharded as it was."""
    put = lambda x: jax.make_array_from_callback(x.shape, leaf.sharding, lambda index: x[index])
    if present.all():
        return put(loaded)
    return jax.jit(jnp.where, out_shardings=leaf.sharding)(put(present), put(loaded), leaf)


def _same_kind(name: str, ours: model.Definition, theirs: model.Definition) -> bool:
    if not name.startswith("layers."):
        return True
    _, index, part, *_ = name.split(".")
    one, other = ours.layers[int(index)], theirs.layers[int(index)]
    return {"mixer": one.kind == other.kind, "mlp": one.mlp_kind == other.mlp_kind}.get(part, True)


def start(path: str, definition: model.Definition, params: model.Params, workdir: Path) -> model.Params:
    """`load` from ``path``, reported in the log and in ``workdir``/init_from.json."""
    with source(path) as other:
        params, report = load(other, definition, params)
        if jax.process_index() == 0:
            other.carry(workdir)
    if not report.loaded:
        raise ConfigError(
            "init_from", path, "has nothing in common with this model: no parameter could be loaded"
        )
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in report._asdict().items())
    log.info("parameters from %s: %s\n  %s", path, counts, "\n  ".join(report.lines()))
    if jax.process_index() == 0:
        (workdir / "init_from.json").write_text(json.dumps(report._asdict(), indent=1) + "\n")
    return params
