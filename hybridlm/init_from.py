"""Starting a run from another's parameters: a workdir's newest checkpoint, or a Hugging Face folder.

"DIR:ema" is the average of the weights in the workdir DIR (optimizer.ema).

Layers are mapped by index, and inside a layer parameters by name; a mixer's or an MLP's only where the kind
is the same, any only where the shape is. A mixer in the place of attention starts from its parameters as far
as `mapping` knows how. What finds no counterpart keeps its fresh value and is reported as new; what nobody
takes is reported as dropped.
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
from hybridlm import lora, mapping, model, program, stack, untrusted, weights
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError
from hybridlm.run import checkpoint, seal
from hybridlm.weights import CARRIED, TOKENIZER

log = logging.getLogger("hybridlm")

EMA = ":ema"
KINDS = ("loaded", "mapped", "new", "dropped")  # in the order that they are told in


class Source(NamedTuple):
    """Another model: its definition, and its parameters by canonical name, anything that NumPy can read.

    carry: brings what an import or export needs to know of a public checkpoint into a workdir.
    tokenizer: the file of its tokenizer, which may not exist.
    """

    definition: model.Definition
    arrays: Mapping[str, Any]
    carry: Callable[[Path], None]
    tokenizer: Path

    def read(self, name: str) -> np.ndarray | None:
        """A parameter in float32; None if there is none of that name."""
        array = self.arrays.get(name)
        return None if array is None else np.asarray(array).astype(np.float32, copy=False)


class Report(NamedTuple):
    """Canonical names. loaded: taken over; new: fresh; dropped: of the source, not taken.

    mapped: made from the source's, each with how.  why: layers whose mixer is fresh, each with what it lacks.
    """

    loaded: list[str]
    new: list[str]
    dropped: list[str]
    mapped: dict[str, str]
    why: dict[str, str]

    def lines(self) -> list[str]:
        """Per part of the model, layers by index, what became of it."""
        parts: dict[str, dict[str, list[str]]] = {}
        for kind in KINDS:
            for name in getattr(self, kind):
                layer = name.startswith("layers.")
                part, rest = (name.split(".", 2)[1], name.split(".", 2)[2]) if layer else (name, "")
                parts.setdefault(f"layer {part}" if layer else part, {}).setdefault(kind, []).append(rest)
        lines = []
        for part, kinds in parts.items():
            alone = len(kinds) == 1
            told = [kind if alone else f"{kind} {', '.join(names)}" for kind, names in kinds.items()]
            lines.append(f"{part}: {'; '.join(told)}")
        return lines + self._mappings()

    def _mappings(self) -> list[str]:
        """How parameters were made, once for all the layers where it is the same, and what could not be."""
        ways: dict[tuple[str, str], list[str]] = {}
        for name, how in self.mapped.items():
            _, layer, rest = name.split(".", 2)
            ways.setdefault((rest, how), []).append(layer)
        said = [f"{rest} of layers {', '.join(layers)}: {how}" for (rest, how), layers in ways.items()]
        return said + [f"{layer}: its mixer is fresh: {why}" for layer, why in self.why.items()]


def split(path: str | Path) -> tuple[Path, bool]:
    """(folder, whether its average is meant) of "DIR" and "DIR:ema"."""
    text = str(Path(path).absolute())
    ema = text.endswith(EMA) and not Path(text).exists()
    return Path(text.removesuffix(EMA) if ema else text), ema


def described(path: str | Path, field: str = "init_from") -> configs.Config:
    """The config of the model at ``path``; ConfigError, of ``field``, if none is readable. Opens no array."""
    return without_factors(_described(path, field)[0])


def _described(path: str | Path, field: str) -> tuple[configs.Config, Any]:
    """(the config of the model at ``path``, all that was read of it if it is a Hugging Face folder)."""
    path, ema = split(path)
    with _named(field):
        if (path / "checkpoints").is_dir():
            config = configs.of_run(path)
            if ema:
                weights.averaged(config, model.build(config), field, f"{path}{EMA}")
            return config, None
        if ema:
            raise ConfigError(field, f"{path}{EMA}", "is the average of no run with checkpoints")
        if not (path / "config.json").is_file():
            problem = "is neither a workdir with checkpoints nor a Hugging Face folder"
            raise ConfigError(field, str(path), problem)
        from hybridlm.convert import families  # only a run that starts from one needs the converters

        imported = families.read_config(path)
        return imported.config, imported


@contextlib.contextmanager
def _named(field: str) -> Iterator[None]:
    """Errors about the flag of another command name the field that named the folder."""
    try:
        yield
    except ConfigError as error:
        if error.field not in ("--hf", "--workdir"):
            raise
        raise ConfigError(field, error.value, error.allowed, error.fix) from error


@contextlib.contextmanager
def source(path: str | Path, field: str = "init_from") -> Iterator[Source]:
    """The model at ``path``, which ``field`` named."""
    config, imported = _described(path, field)
    path, ema = split(path)
    if imported is not None:
        from hybridlm.convert import incoming

        read: dict[str, np.ndarray] = {}
        with _named(field):
            manifest = incoming.fill(path, imported, read.__setitem__)
        carry = lambda workdir: incoming.carry(imported, manifest, workdir)
        yield Source(model.build(config), read, carry, path / TOKENIZER)
        return
    definition = model.build(config)
    with checkpoint.Checkpoints(path / "checkpoints") as saves:
        steps = saves.steps()
        if not steps:
            raise ConfigError(field, str(path), "has no checkpoint")
        arrays = saves.open(steps[-1], "params", model.canonical_shapes(definition))
        if ema:
            arrays |= saves.open(steps[-1], "ema", weights.averaged(config, definition))
        merged, definition = lora.Merged(definition, arrays), model.build(without_factors(config))
        yield Source(definition, merged, lambda workdir: _copy(path / CARRIED, workdir), path / TOKENIZER)


def identity(path: str | Path) -> str:
    """Which parameters there are at ``path`` now: of a workdir its newest checkpoint, of a public folder a
    sample of its files (`seal.sampled`); "" where there is neither."""
    folder, _ = split(path)
    if found := untrusted.numbered(folder / "checkpoints"):
        return f"{found[-1].name} {seal.identity(found[-1])}"
    files = [file for file in (folder / "config.json", *folder.glob("*.safetensors")) if file.is_file()]
    return seal.sampled(files) if files else ""


def without_factors(config: configs.Config) -> configs.Config:
    """Of the same model with its low-rank factors (`hybridlm.lora`) in its matrices, all of it trained."""
    return config.replace(model__lora=(), optimizer__freeze=()) if config.model.lora else config


def _copy(carried: Path, workdir: Path) -> None:
    if carried.is_dir():
        shutil.copytree(carried, workdir / carried.name, dirs_exist_ok=True)


def teacher(config: configs.Config, built: program.Program) -> tuple[model.Params, ...]:
    """(parameters,) of the teacher that the objective names, as `program.Program.teacher` wants them; () for
    an objective without one."""
    if not built.teacher:
        return ()
    (shapes,) = built.teacher
    with source(config.objective.teacher, "objective.teacher") as other:  # type: ignore[attr-defined]
        layout = other.definition.layout
        flat = {}
        for name, leaf in stack.shapes_apart(layout, shapes).items():
            value = np.asarray(other.arrays[name]).astype(leaf.dtype)
            flat[name] = jax.make_array_from_callback(value.shape, leaf.sharding, value.__getitem__)
    where = {name: leaf.sharding for name, leaf in shapes.items()}
    return (jax.jit(lambda flat: stack.restack(layout, flat, list(shapes)), out_shardings=where)(flat),)


def load(
    other: Source, definition: model.Definition, params: model.Params, gates: str = "near"
) -> tuple[model.Params, Report]:
    """``params`` (fresh, wherever they lie) with everything replaced that has a counterpart in ``other``.

    gates: config.init_gates.
    """
    ours = model.unstack(definition, params)
    taken = [
        name
        for name, leaf in ours.items()
        if name in other.arrays
        and tuple(other.arrays[name].shape) == leaf.shape
        and _same_kind(name, definition, other.definition)
    ]
    mapped, why = _mixers(other, definition, {name: leaf.shape for name, leaf in ours.items()}, gates)
    for name in (*taken, *mapped):
        loaded = mapped[name].value if name in mapped else other.read(name)
        assert loaded is not None
        if not np.isfinite(loaded).all():
            fix = "Start from another checkpoint, or leave it out to start fresh."
            raise ConfigError("init_from", name, "holds numbers that are not finite", fix)
        ours[name] = jax.make_array_from_callback(loaded.shape, ours[name].sharding, loaded.__getitem__)
    whole = jax.tree.map(lambda leaf: leaf.sharding, params)
    restack = jax.jit(lambda flat: model.restack(definition, flat), out_shardings=whole)
    new = [name for name in ours if name not in taken and name not in mapped]
    used = {one.rsplit(".mixer.")[0] + f".mixer.{name}" for one, how in mapped.items() for name in how.used}
    dropped = [name for name in other.arrays if name not in taken and name not in used]
    report = Report(taken, new, dropped, {name: one.origin for name, one in mapped.items()}, why)
    return restack(ours), report


def _mixers(
    other: Source, definition: model.Definition, shapes: Mapping[str, tuple[int, ...]], gates: str
) -> tuple[dict[str, mapping.Mapped], dict[str, str]]:
    """What `mapping` makes of the source's mixers by canonical name, and why not, by layer."""
    found: dict[str, mapping.Mapped] = {}
    why: dict[str, str] = {}
    if other.definition.d_model != definition.d_model:
        return found, why
    for index, (theirs, ours) in enumerate(zip(other.definition.layers, definition.layers, strict=False)):
        start = f"layers.{index}.mixer."
        read = lambda name, start=start: other.read(start + name)
        own = {name.removeprefix(start): shape for name, shape in shapes.items() if name.startswith(start)}
        layer = mapping.Layer(definition.d_model, read, own, gates)
        made, problem = mapping.mixer(theirs.config, ours.config, layer)
        found |= {start + name: one for name, one in made.items()}
        why |= {f"layer {index}": problem} if problem else {}
    return found, why


def _same_kind(name: str, ours: model.Definition, theirs: model.Definition) -> bool:
    if not name.startswith("layers."):
        return True
    _, index, part, *_ = name.split(".")
    one, other = ours.layers[int(index)], theirs.layers[int(index)]
    return {"mixer": one.kind == other.kind, "mlp": one.mlp_kind == other.mlp_kind}.get(part, True)


def unlike(theirs: model.Definition, ours: model.Definition) -> list[str]:
    """In words, the settings with which parameters of theirs compute something else in a layer of the same
    kind, or around the layers, of ours."""
    from hybridlm.convert.family import SETTINGS, settings_of  # only a run that starts from one

    sized = ("d_model", "vocab_size")  # what does not fit is not loaded
    pairs = [(name, getattr(ours.model, name), getattr(theirs.model, name)) for name in SETTINGS]
    found = [f"model.{n} {a!r}, not {b!r}" for n, a, b in pairs if a != b and n not in sized]
    layers: dict[str, list[str]] = {}
    for index, (one, other) in enumerate(zip(ours.layers, theirs.layers, strict=False)):
        a, b = ({"post_norm": spec.post_norm, "stream": spec.stream} for spec in (one, other))
        if one.kind == other.kind:
            a |= settings_of(one.config.explicit(ours.d_model))
            b |= settings_of(other.config.explicit(theirs.d_model))
        if one.mlp_kind == other.mlp_kind:
            a |= {f"mlp.{n}": value for n, value in vars(one.mlp_config.explicit()).items()}
            b |= {f"mlp.{n}": value for n, value in vars(other.mlp_config.explicit()).items()}
        for name, value in a.items():
            if value != b.get(name):
                layers.setdefault(f"{name} {value!r}, not {b.get(name)!r}", []).append(str(index))
    return found + [f"layers {', '.join(at)}: {said}" for said, at in layers.items()]


def start(
    path: str,
    definition: model.Definition,
    params: model.Params,
    workdir: Path,
    tokenizer: Tokenizer | None = None,
    gates: str = "near",
) -> model.Params:
    """`load` from ``path``, reported in the log and in ``workdir``/init_from.json.

    tokenizer: of the data that the run will see; a warning where the source's embedding stands for others.
    gates: config.init_gates.
    """
    with source(path) as other:
        params, report = load(other, definition, params, gates)
        if differing := unlike(other.definition, definition):
            log.warning("parameters are loaded into other settings than theirs: %s", "; ".join(differing))
        if jax.process_index() == 0:
            other.carry(workdir)
            if "embedding" in report.loaded and tokenizer is not None:
                _compare(other.tokenizer, tokenizer)
    if not report.loaded:
        problem = "has nothing in common with this model: no parameter could be loaded"
        raise ConfigError("init_from", path, problem)
    counts = ", ".join(f"{len(getattr(report, kind))} {kind}" for kind in KINDS)
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
