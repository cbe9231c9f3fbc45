"""Export: a checkpoint of a workdir becomes a Hugging Face folder.

A run whose architecture is still that of an import goes out in the import's form, tensor by tensor; any other
in the form of the first family that says it. The folder gets its name when it is whole.
"""

import functools
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm import config as configs
from hybridlm import lora, model, untrusted, weights
from hybridlm.convert import tensors, tokens
from hybridlm.convert.families import CONFIG, FAMILIES, Plan, plan, read_config, written
from hybridlm.convert.family import Family, same_model
from hybridlm.convert.incoming import DERIVED, HEAD, MANIFEST, writing
from hybridlm.convert.rules import regroup
from hybridlm.errors import ConfigError
from hybridlm.init_from import CARRIED, without_factors
from hybridlm.run import checkpoint

log = logging.getLogger("hybridlm")

SHARD_BYTES = 5 * 10**9
TORCH = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SHAPE = {str: {"rule": str, "file": str, "dtype": str, "shape": [untrusted.NATURAL]}}

Manifest = dict[str, dict[str, Any]]


def export_hf(
    workdir: str | Path, directory: str | Path, model_type: str = "", dtype: str = "",
    step: int | None = None, ema: bool = False,
) -> str:  # fmt: skip
    """Writes the newest checkpoint of ``workdir`` (or that at ``step``) as a Hugging Face folder.

    model_type: of the result; "" is that of the import, or else the first family that can say the model.
    dtype: F32, BF16 or F16; "" is that of the import, or else F32.  ema: the average of the weights in place
        of them. Returns the model_type.
    """
    workdir, directory = Path(workdir).absolute(), Path(directory).absolute()
    if dtype and dtype not in tensors.DTYPES:
        raise ConfigError("--dtype", dtype, "must be one of " + ", ".join(tensors.DTYPES))
    config = configs.of_run(workdir)
    definition = model.build(config)
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError("--workdir", str(workdir), "holds no checkpoints", "Train the run first.")
    averaged = weights.averaged(config, definition) if ema else []
    beside = directory.with_name(f".{directory.name}.exporting")
    with writing("--hf", directory), checkpoint.Checkpoints(workdir / "checkpoints") as saves:
        if directory.exists() and any(directory.iterdir()):
            raise ConfigError("--hf", str(directory), "must be a new or empty directory")
        names = model.canonical_shapes(definition)
        step = saves.chosen(step)
        params = saves.open(step, "params", names)
        if ema:
            params |= saves.open(step, "ema", averaged)
        merged = lora.Merged(definition, params)
        definition = model.build(without_factors(config))
        carried = _carried(workdir, definition) if not model_type else None
        model_type, values = carried or written(definition, model_type)
        planned = plan(definition, FAMILIES[model_type], values)
        manifest = _manifest(workdir, planned, FAMILIES[model_type]) if carried else None
        shutil.rmtree(beside, ignore_errors=True)  # of an export that was killed
        beside.mkdir(parents=True)
        try:
            files = _files(planned, manifest, dtype)
            _check_room(beside, files)
            _describe(workdir, config, beside, values, manifest is not None, files, dtype)
            kept = _kept(workdir, files) if manifest is not None else {}
            tensors.write(beside, files, _values(planned, manifest, merged, kept))
            beside.rename(directory)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return model_type


def _carried(workdir: Path, definition: model.Definition) -> tuple[str, dict[str, Any]] | None:
    """(model_type, config.json) of the import that the run came from, if it is still its architecture."""
    carried = workdir / CARRIED
    if not (carried / MANIFEST).is_file():
        return None
    source = read_config(carried)
    difference = same_model(model.build(source.config), definition)
    if difference:
        log.warning("not the architecture that was imported: %s", difference)
        return None
    return source.model_type, source.values


def _manifest(workdir: Path, planned: Plan, family: Family) -> Manifest:
    """How the import's tensors were stored. The file may come from anywhere: ConfigError where it does not
    fit the model, or names a file that is none of weights in the folder to be made."""
    path = untrusted.inside(workdir / CARRIED, MANIFEST, "--workdir")
    manifest: Manifest = untrusted.read_json(path, "--workdir", SHAPE)
    refuse = lambda problem: ConfigError("--workdir", str(path), problem, "Export with --model_type instead.")
    for name, one in manifest.items():
        file = one["file"]
        untrusted.inside(workdir / CARRIED, file, "--workdir")
        if "/" in file or not file.endswith(".safetensors") or file.startswith("."):
            raise refuse(f"names a file {file!r}, which must be a .safetensors")
        if one["dtype"] not in tensors.DTYPES or one["rule"] not in planned.shapes:
            raise refuse(f"has a tensor {untrusted.terminal(name)} that the model has not")
        if one["rule"] != (name if name in planned.shapes else family.rename(name)) and name != HEAD:
            raise refuse(f"calls the tensor {one['rule']} {untrusted.terminal(name)}, which no import would")
    shapes = {one["rule"]: tuple(one["shape"]) for one in manifest.values()}
    rules = [rule for rule in planned.rules if not rule.shapes or rule.theirs[0] in shapes]
    if missing := sorted({name for rule in rules for name in rule.theirs} - set(shapes)):
        raise refuse(f"lacks {missing[0]}")
    for rule in rules:
        ours, theirs = ([table[name] for name in rule.theirs] for table in (planned.shapes, shapes))
        if ours != theirs and not (rule.loose and sum(map(math.prod, ours)) == sum(map(math.prod, theirs))):
            raise refuse(f"has {rule.theirs[0]} of other shapes than the model")
    return manifest


def _files(planned: Plan, manifest: Manifest | None, dtype: str) -> dict[str, tensors.Planned]:
    if manifest is None:
        listed = [(name, dtype or "F32", shape) for name, shape in planned.shapes.items()]
        return tensors.shards(listed, SHARD_BYTES)
    return {
        name: tensors.Planned(one["file"], dtype or one["dtype"], tuple(one["shape"]))
        for name, one in manifest.items()
    }


def _check_room(folder: Path, files: Mapping[str, tensors.Planned]) -> None:
    need, free = sum(one.nbytes for one in files.values()), shutil.disk_usage(folder).free
    if free < need:
        raise ConfigError("--hf", str(folder.parent), f"has {free:,} bytes free, the tensors need {need:,}")


def _describe(
    workdir: Path,
    config: configs.Config,
    folder: Path,
    values: dict[str, Any],
    carried: bool,
    files: Mapping[str, tensors.Planned],
    dtype: str,
) -> None:
    """Everything but the tensors: config.json, the run's tokenizer, and what an import brought."""
    own = tokens.of(workdir, config)
    if carried:
        for file in sorted((workdir / CARRIED).iterdir()):
            if (
                file.name not in (MANIFEST, DERIVED)
                and file.is_file()
                and not tokens.foreign(file, own, config)
            ):
                inside = untrusted.inside(workdir / CARRIED, file.name, "--workdir")
                untrusted.write_bytes(folder / file.name, untrusted.read_bytes(inside, "--workdir"))
        named = "dtype" if "dtype" in values else "torch_dtype"
        if dtype and values.get(named) != TORCH[dtype]:
            untrusted.write_json(folder / CONFIG, values | {named: TORCH[dtype]})
    else:
        [stored] = {one.dtype for one in files.values()}
        ids = tokens.special(workdir, own)
        untrusted.write_json(folder / CONFIG, values | ids | {"dtype": TORCH[stored]})
    tokens.write(folder, own, config)


def _kept(workdir: Path, files: Mapping[str, tensors.Planned]) -> dict[str, Callable[[], np.ndarray]]:
    """Of the tensors that the import had besides parameters, name -> what reads it."""
    if not (workdir / CARRIED / DERIVED).is_file():
        return {}
    folder = tensors.Folder(workdir / CARRIED, DERIVED)
    fits = lambda name, held: name in files and held.shape == files[name].shape
    return {
        name: functools.partial(folder.read, name)
        for name, held in folder.tensors.items()
        if fits(name, held) and held.dtype in tensors.DTYPES
    }


def _values(
    planned: Plan,
    manifest: Manifest | None,
    params: Mapping[str, Any],
    kept: Mapping[str, Callable[[], np.ndarray]],
) -> Any:
    """Name of a tensor -> its array, each asked for once.  kept: of tensors that are no parameters."""
    by_name = {
        name: (number, at) for number, rule in enumerate(planned.rules) for at, name in enumerate(rule.theirs)
    }

    def outward(number: int) -> list[np.ndarray]:
        rule = planned.rules[number]
        ours = [np.asarray(params[name]) for name in rule.ours]
        arrays = list(rule.outward(ours))
        if rule.loose and manifest is not None:
            shapes = {one["rule"]: tuple(one["shape"]) for one in manifest.values()}
            arrays = regroup(arrays, [shapes[name] for name in rule.theirs])
        return arrays

    # A layer's experts are three rules of many tensors each, which alternate in a file.
    few = functools.lru_cache(maxsize=3)(outward)

    def value(name: str) -> np.ndarray:
        number, at = by_name[manifest[name]["rule"] if manifest is not None else name]
        rule = planned.rules[number]
        if rule.shapes and name in kept:
            return kept[name]()
        return (outward if len(rule.theirs) == 1 else few)(number)[at]

    return value
