"""Starting a run from another's parameters: a workdir's newest checkpoint, or a Hugging Face folder.

"DIR:ema" is the average of the weights in the workdir DIR (optimizer.ema).

Layers are mapped by index, and inside a layer parameters by name; a mixer's or an MLP's only where the kind
is the same, any only where the shape is. What finds no counterpart keeps its fresh value and is reported as
new; what nobody takes is reported as dropped.
"""

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hybridlm import config as configs
from hybridlm import model, untrusted, weights
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError
from hybridlm.run import checkpoint
from hybridlm.weights import CARRIED, TOKENIZER

log = logging.getLogger("hybridlm")

EMA = ":ema"


class Source(NamedTuple):
    """Another model: its definition, and its parameters by canonical name, anything that NumPy can read.

    carry: brings what an import or export needs to know of a public checkpoint into a workdir.
    tokenizer: the file of its tokenizer, which may not exist.
    """

    definition: model.Definition
    arrays: Mapping[str, Any]
    carry: Callable[[Path], None]
    tokenizer: Path


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


def split(path: str | Path) -> tuple[Path, bool]:
    """(folder, whether its average is meant) of "DIR" and "DIR:ema"."""
    text = str(Path(path).absolute())
    ema = text.endswith(EMA) and not Path(text).exists()
    return Path(text.removesuffix(EMA) if ema else text), ema


def check(path: str | Path) -> None:
    """ConfigError unless there is a model at ``path``, its config readable; opens no array."""
    path, ema = split(path)
    if (path / "checkpoints").is_dir():
        config = configs.of_run(path)
        if ema:
            weights.averaged(config, model.build(config), "init_from")
    elif ema:
        raise ConfigError("init_from", f"{path}{EMA}", "is the average of no run with checkpoints")
    elif (path / "config.json").is_file():
        from hybridlm.convert import families  # only a run that starts from one needs the converters

        families.read_config(path)
    else:
        problem = "is neither a workdir with checkpoints nor a Hugging Face folder"
        raise ConfigError("init_from", str(path), problem)


@contextlib.contextmanager
def source(path: str | Path) -> Iterator[Source]:
    """The model at ``path``."""
    check(path)
    path, ema = split(path)
    if (path / "checkpoints").is_dir():
        config = configs.of_run(path)
        definition = model.build(config)
        with checkpoint.Checkpoints(path / "checkpoints") as saves:
            steps = saves.steps()
            if not steps:
                raise ConfigError("init_from", str(path), "has no checkpoint")
            arrays = saves.open(steps[-1], "params", model.canonical_shapes(definition))
            if ema:
                arrays |= saves.open(steps[-1], "ema", weights.averaged(config, definition, "init_from"))
            yield Source(definition, arrays, lambda workdir: _copy(path / CARRIED, workdir), path / TOKENIZER)
    else:
        from hybridlm.convert import families, incoming

        imported = families.read_config(path)
        read: dict[str, np.ndarray] = {}
        manifest = incoming.fill(path, imported, read.__setitem__)
        carry = lambda workdir: incoming.carry(imported, manifest, workdir)
        yield Source(model.build(imported.config), read, carry, path / TOKENIZER)


def _copy(carried: Path, workdir: Path) -> None:
    if carried.is_dir():
        shutil.copytree(carried, workdir / carried.name, dirs_exist_ok=True)


def load(other: Source, definition: model.Definition, params: model.Params) -> tuple[model.Params, Report]:
    """``params`` (fresh, wherever they lie) with everything replaced that has a counterpart in ``other``."""
    ours = model.unstack(definition, params)
    taken = [
        name
        for name, leaf in ours.items()
        if name in other.arrays
        and tuple(other.arrays[name].shape) == leaf.shape
        and _same_kind(name, definition, other.definition)
    ]
    for name in taken:
        loaded = np.asarray(other.arrays[name]).astype(np.float32, copy=False)
        put = lambda index, loaded=loaded: loaded[index]
        ours[name] = jax.make_array_from_callback(loaded.shape, ours[name].sharding, put)
    whole = jax.tree.map(lambda leaf: leaf.sharding, params)
    restack = jax.jit(lambda flat: model.restack(definition, flat), out_shardings=whole)
    new = [name for name in ours if name not in taken]
    report = Report(taken, new, [name for name in other.arrays if name not in taken])
    return restack(ours), report


def _same_kind(name: str, ours: model.Definition, theirs: model.Definition) -> bool:
    if not name.startswith("layers."):
        return True
    _, index, part, *_ = name.split(".")
    one, other = ours.layers[int(index)], theirs.layers[int(index)]
    return {"mixer": one.kind == other.kind, "mlp": one.mlp_kind == other.mlp_kind}.get(part, True)


def start(
    path: str,
    definition: model.Definition,
    params: model.Params,
    workdir: Path,
    tokenizer: Tokenizer | None = None,
) -> model.Params:
    """`load` from ``path``, reported in the log and in ``workdir``/init_from.json.

    tokenizer: of the data that the run will see; a warning where the source's embedding stands for others.
    """
    with source(path) as other:
        params, report = load(other, definition, params)
        if jax.process_index() == 0:
            other.carry(workdir)
            if "embedding" in report.loaded and tokenizer is not None:
                _compare(other.tokenizer, tokenizer)
    if not report.loaded:
        raise ConfigError(
            "init_from", path, "has nothing in common with this model: no parameter could be loaded"
        )
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in report._asdict().items())
    log.info("parameters from %s: %s\n  %s", path, counts, "\n  ".join(report.lines()))
    if jax.process_index() == 0:
        untrusted.write_json(workdir / "init_from.json", report._asdict())
    return params


def _compare(theirs: Path, ours: Tokenizer) -> None:
    if theirs.is_file() and hashlib.sha256(theirs.read_bytes()).hexdigest() != ours.fingerprint:
        log.warning(
            "the embedding was learnt with the tokenizer %s, the data come with %s: "
            "set data.tokenizer, unless you mean it",
            theirs, ours.name,
        )  # fmt: skip
