"""Import and export: a family's rules applied between a Hugging Face folder and a run's workdir.

An imported workdir has config.json, layers.json, a checkpoint at step 0 with parameters only, and hf/: what
the folder held besides weights (config.json, tokenizer), and manifest.json, how the tensors were stored, so
that an export gives back the same bytes. Tensors pass one rule at a time, from one disk to the other, so
that memory need not hold the model.
"""

import functools
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hybridlm import config as configs
from hybridlm import cost, model
from hybridlm.convert import fla, kimi_linear, olmo_hybrid, qwen3, qwen3_next, tensors
from hybridlm.convert.family import Family, same_model
from hybridlm.convert.fields import Fields
from hybridlm.convert.rules import Rule, regroup
from hybridlm.errors import ConfigError, nearest
from hybridlm.init_from import CARRIED
from hybridlm.run import checkpoint
from hybridlm.run.checkpoint import FORMAT

log = logging.getLogger("hybridlm")

FAMILIES = {
    model_type: family
    for family in (
        fla.FAMILY, qwen3.FAMILY, *qwen3_next.FAMILIES.values(), kimi_linear.FAMILY, olmo_hybrid.FAMILY
    )
    for model_type in family.classes
}  # fmt: skip
MULTIMODAL = {outer: inner for one in FAMILIES.values() for outer, inner in one.multimodal.items()}
MANIFEST, CONFIG = "manifest.json", "config.json"
HEAD, SHARD_BYTES, SHOWN = "lm_head.weight", 5 * 10**9, 20


class Source(NamedTuple):
    """A Hugging Face folder, read as far as its config.json. values: that, or its text_config."""

    directory: Path
    values: dict[str, Any]
    model_type: str
    family: Family
    config: configs.Config


def read_config(directory: str | Path) -> Source:
    """ConfigError when config.json is missing, of no known model_type or asks for something not supported."""
    file = Path(directory) / CONFIG
    if not file.is_file():
        fix = "Name a local folder; a model of the Hub is to be downloaded first."
        raise ConfigError("--hf", str(directory), f"holds no {CONFIG}", fix)
    try:
        values = json.loads(file.read_text())
        model_type = values["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"is no readable config.json with a model_type ({type(error).__name__}: {error})"
        raise ConfigError("--hf", str(file), problem) from None
    if model_type in MULTIMODAL:
        values, model_type = _text(values, file), MULTIMODAL[model_type]
    if model_type not in FAMILIES:
        known = "must be one of " + ", ".join(sorted(FAMILIES))
        raise ConfigError(f"{CONFIG}: model_type", model_type, known, nearest(str(model_type), FAMILIES))
    family = FAMILIES[model_type]
    return Source(Path(directory), values, model_type, family, family.read(Fields(values)).config())


def _text(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """The config of a multimodal model's language model."""
    inner, expected = values.get("text_config"), MULTIMODAL[values["model_type"]]
    if not isinstance(inner, dict) or inner.get("model_type", expected) != expected:
        raise ConfigError(f"{CONFIG}: text_config", str(file), f"must be a mapping of model_type {expected}")
    tied = values.get("tie_word_embeddings", inner.get("tie_word_embeddings", False))
    name = values.get("architectures") or ["ForConditionalGeneration"]
    causal = [one.replace("ForConditionalGeneration", "ForCausalLM") for one in name]
    return inner | {"model_type": expected, "tie_word_embeddings": tied, "architectures": causal}


class Plan(NamedTuple):
    """How a model's parameters and a checkpoint's tensors correspond.

    shapes: of every tensor, as the rules have it.
    """

    rules: list[Rule]
    shapes: dict[str, tuple[int, ...]]


def plan(definition: model.Definition, family: Family) -> Plan:
    ours = model.canonical_shapes(definition)
    rules = family.rules(definition)
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        theirs = rule.their_shapes([ours[name].shape for name in rule.ours])
        shapes |= dict(zip(rule.theirs, theirs, strict=True))
    named = {name for rule in rules for name in rule.ours}
    assert named == set(ours), sorted(named ^ set(ours))  # every parameter has a rule, or the rules are wrong
    return Plan(rules, shapes)


class Stored(NamedTuple):
    """How a tensor lies in the folder: its name there and the header's entry."""

    name: str
    tensor: tensors.Tensor


def match(folder: tensors.Folder, source: Source, planned: Plan) -> dict[str, Stored]:
    """The rules' name of each tensor -> Stored. ConfigError that lists all that do not fit."""
    found: dict[str, Stored] = {}
    problems: dict[str, list[str]] = {}
    say = lambda what, line: problems.setdefault(what, []).append(line)
    dropped = (
        [name for name in folder.tensors if name.startswith(source.family.unused)]
        if source.family.unused
        else []
    )
    for name, tensor in folder.tensors.items():
        alias = name if name in planned.shapes else source.family.rename(name)
        if name in dropped:
            continue
        if alias in planned.shapes and alias not in found:
            found[alias] = Stored(name, tensor)
        elif name != HEAD:
            say("unknown tensors", name)
        elif not _equal(folder, name, found_embedding(folder)):
            say(
                "tie_word_embeddings is true, and yet lm_head.weight is there and differs from the embedding",
                name,
            )
    loose = {name: rule for rule in planned.rules if rule.loose for name in rule.theirs}
    for name, shape in planned.shapes.items():
        if name not in found:
            say("missing tensors", f"{name} {list(shape)}")
            continue
        stored = found[name].tensor
        if stored.dtype not in tensors.DTYPES:
            say(f"dtypes other than {', '.join(tensors.DTYPES)}", f"{found[name].name} {stored.dtype}")
        fits = stored.shape == shape
        if name in loose and not fits and all(one in found for one in loose[name].theirs):
            size = lambda shapes: sum(int(np.prod(one)) for one in shapes)
            names = loose[name].theirs
            fits = size(found[one].tensor.shape for one in names) == size(
                planned.shapes[one] for one in names
            )
        if not fits:
            hint = " (transposed?)" if stored.shape == shape[::-1] else ""
            say("shapes", f"{found[name].name} is {list(stored.shape)}, must be {list(shape)}{hint}")
    if problems:
        text = "; ".join(f"{what}: {_shown(lines)}" for what, lines in problems.items())
        raise ConfigError("--hf", str(folder.directory), f"does not fit its config.json: {text}")
    if dropped:
        log.warning("left out, no part of the language model's forward pass: %s", _shown(dropped))
    return found


def found_embedding(folder: tensors.Folder) -> str:
    return next(
        (name for name in folder.tensors if name.endswith((".embed_tokens.weight", ".embeddings.weight"))),
        HEAD,
    )


def _equal(folder: tensors.Folder, one: str, other: str) -> bool:
    return one != other and np.array_equal(folder.read(one), folder.read(other))


def _shown(lines: list[str]) -> str:
    more = len(lines) - SHOWN
    return ", ".join(lines[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def fill(directory: str | Path, source: Source, put: Callable[[str, np.ndarray], None]) -> dict[str, Any]:
    """Reads every tensor and hands ``put`` every parameter's name and float32 array; returns the manifest."""
    folder = tensors.Folder(directory)
    planned = plan(model.build(source.config), source.family)
    stored = match(folder, source, planned)
    for rule in planned.rules:
        arrays = [folder.read(stored[name].name) for name in rule.theirs]
        arrays = regroup(arrays, [planned.shapes[name] for name in rule.theirs])
        for name, array in zip(rule.ours, rule.inward(arrays), strict=True):
            put(name, array)
    known = {one.name: name for name, one in stored.items()}
    if HEAD in folder.tensors and HEAD not in known:
        known[HEAD] = next(name for name, one in stored.items() if one.name == found_embedding(folder))
    order = sorted(known, key=lambda name: (folder.tensors[name].file, folder.tensors[name].start))
    return {
        name: {
            "rule": known[name],
            "file": folder.tensors[name].file.name,
            "dtype": folder.tensors[name].dtype,
            "shape": folder.tensors[name].shape,
        }
        for name in order
    }


def import_hf(directory: str | Path, workdir: str | Path) -> configs.Config:
    """Makes ``workdir`` from the Hugging Face folder ``directory`` and returns its config."""
    source, workdir = read_config(directory), Path(workdir).absolute()
    definition = model.build(source.config)
    workdir.mkdir(parents=True, exist_ok=True)
    if (workdir / "checkpoints").exists():
        raise ConfigError("--workdir", str(workdir), "already holds checkpoints", "Give another.")
    summary, config = cost.summary(source.config), source.config.to_dict()
    record = {"config": config, "layers": summary, "fingerprint": "imported", "step": 0, "format": FORMAT}
    with tempfile.TemporaryDirectory(dir=workdir, prefix="importing-", ignore_cleanup_errors=True) as scratch:
        with checkpoint.Checkpoints(scratch) as saves:
            leaves = saves.create(0, "params", model.canonical_shapes(definition), record)

            def put(name: str, array: np.ndarray) -> None:
                leaves[name][...] = array.astype(np.float32, copy=False)

            manifest = fill(directory, source, put)
        Path(scratch).rename(workdir / "checkpoints")  # only now, when it is whole
    (workdir / CONFIG).write_text(configs.to_json(source.config))
    (workdir / "layers.json").write_text(json.dumps(summary, indent=2) + "\n")
    carry(source, manifest, workdir)
    return source.config


def carry(source: Source, manifest: Mapping[str, Any], workdir: Path) -> None:
    """What a Hugging Face folder holds besides weights, and the manifest, into ``workdir``/hf."""
    carried = workdir / CARRIED
    carried.mkdir(exist_ok=True)
    for file in source.directory.iterdir():
        weights = ".safetensors" in file.name or file.suffix in (".bin", ".pth", ".npz")
        if file.is_file() and not weights:
            shutil.copyfile(file, carried / file.name)
    if json.loads((carried / CONFIG).read_text()) != source.values:  # of a multimodal model
        (carried / CONFIG).write_text(json.dumps(source.values, indent=2) + "\n")
    (carried / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def export_hf(
    workdir: str | Path, directory: str | Path, model_type: str = "", dtype: str = "", step: int | None = None
) -> str:
    """Writes the newest checkpoint of ``workdir`` (or that at ``step``) as a Hugging Face folder.

    model_type: of the result; "" is that of the import, or else the first family that can say the model.
    dtype: F32, BF16 or F16; "" is that of the import, or else F32. Returns the model_type.
    """
    workdir, directory = Path(workdir).absolute(), Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError("--hf", str(directory), "must be a new or empty directory")
    if dtype and dtype not in tensors.DTYPES:
        raise ConfigError("--dtype", dtype, "must be one of " + ", ".join(tensors.DTYPES))
    definition = model.build(configs.of_run(workdir))
    with checkpoint.Checkpoints(workdir / "checkpoints") as saves:
        steps = saves.steps()
        if not steps or step not in (None, *steps):
            raise ConfigError("--workdir", str(workdir), f"has checkpoints at steps {steps}")
        names = model.canonical_shapes(definition)
        params = saves.open(steps[-1] if step is None else step, "params", names)
        carried = _carried(workdir, definition) if not model_type else None
        if carried:
            model_type, manifest = carried
        else:
            model_type, values = _written(definition, model_type)
            manifest = None
        family = FAMILIES[model_type]
        planned = plan(definition, family)
        directory.mkdir(parents=True, exist_ok=True)
        if carried:
            for file in (workdir / CARRIED).iterdir():
                if file.name != MANIFEST:
                    shutil.copyfile(file, directory / file.name)
        else:
            values |= _tokens(workdir) | _dtype(dtype)
            (directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
        _write(directory, planned, manifest, dtype, params)
    return model_type


def _carried(workdir: Path, definition: model.Definition) -> tuple[str, dict[str, Any]] | None:
    """(model_type, manifest) of the import that the run came from, if it is still the same architecture."""
    carried = workdir / CARRIED
    if not (carried / MANIFEST).is_file():
        return None
    source = read_config(carried)
    difference = same_model(model.build(source.config), definition)
    if difference:
        log.warning("not the architecture that was imported: %s", difference)
        return None
    return source.model_type, json.loads((carried / MANIFEST).read_text())


def _written(definition: model.Definition, model_type: str) -> tuple[str, dict[str, Any]]:
    """(model_type, config.json) of the first family that says this model and reads back as it."""
    reasons = []
    for name in [model_type] if model_type else FAMILIES:
        if name not in FAMILIES:
            raise ConfigError("--model_type", name, "is no known family", nearest(name, FAMILIES))
        try:
            values = FAMILIES[name].write(definition, name)
            config = FAMILIES[name].read(Fields(values)).config()
        except ConfigError as error:
            reasons.append(f"{name} ({error.allowed})")
            continue
        difference = same_model(model.build(config), definition)
        if not difference:
            return name, values
        reasons.append(f"{name} ({difference})")
    raise ConfigError("--workdir", "its model", "is none that a public family can say: " + "; ".join(reasons))


def _tokens(workdir: Path) -> dict[str, int | None]:
    """The special tokens of the import, null where there was none: a family's defaults may not exist here."""
    file = workdir / CARRIED / CONFIG
    imported = json.loads(file.read_text()) if file.is_file() else {}
    return {name: imported.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def _dtype(dtype: str) -> dict[str, str]:
    return {"dtype": {"": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype]}


def _write(
    directory: Path,
    planned: Plan,
    manifest: Mapping[str, Any] | None,
    dtype: str,
    params: Mapping[str, Any],
) -> None:
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
    kept = functools.lru_cache(maxsize=3)(outward)

    def value(name: str) -> np.ndarray:
        number, at = by_name[manifest[name]["rule"] if manifest is not None else name]
        return (outward if len(planned.rules[number].theirs) == 1 else kept)(number)[at]

    if manifest is None:
        listed = [(name, dtype or "F32", shape) for name, shape in planned.shapes.items()]
        files = tensors.shards(listed, SHARD_BYTES)
    else:
        files = {
            name: tensors.Planned(one["file"], dtype or one["dtype"], tuple(one["shape"]))
            for name, one in manifest.items()
        }
    tensors.write(directory, files, value)
