"""Import: a Hugging Face folder becomes a workdir.

It has config.json, layers.json, a checkpoint at step 0 with parameters only, tokenizer.json where there was
one, and hf/: what the folder held besides weights (config.json, tokenizer), and manifest.json, how the
tensors were stored, so that an export gives back the same bytes; those that follow from config.json
(`rules.derived`) are there in derived.safetensors. Tensors pass one rule at a time, from one
disk to the other, so that memory need not hold the model. The checkpoint gets its name last: until then the
workdir holds no model, and the same command starts anew.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hybridlm import config as configs
from hybridlm import cost, model, untrusted
from hybridlm.convert import tensors
from hybridlm.convert.families import CONFIG, Plan, Source, plan, read_config
from hybridlm.convert.rules import regroup
from hybridlm.data import tokenizer as tokenizers
from hybridlm.errors import ConfigError
from hybridlm.init_from import CARRIED
from hybridlm.run import checkpoint
from hybridlm.run.checkpoint import FORMAT
from hybridlm.run.lock import Lock
from hybridlm.weights import TOKENIZER

log = logging.getLogger("hybridlm")

MANIFEST, SCRATCH = "manifest.json", "importing"
DERIVED = "derived.safetensors"
HEAD, SHOWN = "lm_head.weight", 20
WEIGHTS = (".bin", ".pth", ".pt", ".npz", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")


class Stored(NamedTuple):
    """How a tensor lies in the folder: its name there and the header's entry."""

    name: str
    tensor: tensors.Tensor


def match(folder: tensors.Folder, source: Source, planned: Plan) -> dict[str, Stored]:
    """The rules' name of each tensor -> Stored. ConfigError that lists all that do not fit."""
    found: dict[str, Stored] = {}
    problems: dict[str, list[str]] = {}
    say = lambda what, line: problems.setdefault(what, []).append(untrusted.terminal(line))
    unused = source.family.unused(source.values)
    dropped = [name for name in folder.tensors if unused and name.startswith(unused)]
    for name, tensor in folder.tensors.items():
        alias = name if name in planned.shapes else source.family.rename(name)
        if name in dropped:
            continue
        if alias in planned.shapes and alias not in found:
            found[alias] = Stored(name, tensor)
        elif name != HEAD:
            say("unknown tensors", name)
        elif not _equal(folder, name, found_embedding(folder)):
            differs = "tie_word_embeddings is true, and yet lm_head.weight is there and differs"
            say(f"{differs} from the embedding", name)
    _check(found, planned, say)
    if problems:
        text = "; ".join(f"{what}: {_shown(lines)}" for what, lines in problems.items())
        raise ConfigError("--hf", str(folder.directory), f"does not fit its config.json: {text}")
    if dropped:
        left_out = _shown([untrusted.terminal(name) for name in dropped])
        log.warning("left out, no part of the language model's forward pass: %s", left_out)
    return found


def _check(found: Mapping[str, Stored], planned: Plan, say: Callable[[str, str], None]) -> None:
    """Dtypes and shapes of the tensors that were found, and those that were not."""
    loose = {name: rule for rule in planned.rules if rule.loose for name in rule.theirs}
    may_lack = {name for rule in planned.rules if rule.shapes for name in rule.theirs}
    size = lambda shapes: sum(int(np.prod(one)) for one in shapes)
    for name, shape in planned.shapes.items():
        if name not in found and name in may_lack:
            continue
        if name not in found:
            say("missing tensors", f"{name} {list(shape)}")
            continue
        stored = found[name].tensor
        if stored.dtype not in tensors.DTYPES:
            say(f"dtypes other than {', '.join(tensors.DTYPES)}", f"{found[name].name} {stored.dtype}")
        fits = stored.shape == shape
        if name in loose and not fits and all(one in found for one in loose[name].theirs):
            names = loose[name].theirs
            theirs = size(found[one].tensor.shape for one in names)
            fits = theirs == size(planned.shapes[one] for one in names)
        if not fits:
            hint = " (transposed?)" if stored.shape == shape[::-1] else ""
            say("shapes", f"{found[name].name} is {list(stored.shape)}, must be {list(shape)}{hint}")


def found_embedding(folder: tensors.Folder) -> str:
    ends = (".embed_tokens.weight", ".embeddings.weight")
    return next((name for name in folder.tensors if name.endswith(ends)), HEAD)


def _equal(folder: tensors.Folder, a: str, b: str) -> bool:
    one, other = folder.tensors[a], folder.tensors[b]
    same_form = one.dtype == other.dtype and one.shape == other.shape and one.dtype in tensors.DTYPES
    return same_form and np.array_equal(folder.read(a), folder.read(b))


def _shown(lines: list[str]) -> str:
    rest = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return ", ".join(lines[:SHOWN]) + rest


def fill(
    directory: str | Path, source: Source, put: Callable[[str, np.ndarray], None]
) -> dict[str, dict[str, Any]]:
    """Reads every tensor and hands ``put`` every parameter's name and float32 array; returns the manifest."""
    folder = tensors.Folder(directory)
    planned = plan(model.build(source.config), source.family, source.values)
    stored = match(folder, source, planned)
    for rule in planned.rules:
        if rule.shapes and rule.theirs[0] not in stored:
            continue
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
    """Makes ``workdir`` from the Hugging Face folder ``directory`` and returns its config.

    ConfigError for a folder that does not fit, RunError for a disk that takes no more; then no checkpoint.
    """
    source, workdir = read_config(directory), Path(workdir).absolute()
    with writing("--workdir", workdir), Lock(workdir):
        if (workdir / "checkpoints").exists():
            raise ConfigError("--workdir", str(workdir), "already holds checkpoints", "Give another.")
        config = source.config
        config = config.replace(data__tokenizer=str(workdir / TOKENIZER))
        scratch = workdir / SCRATCH
        shutil.rmtree(scratch, ignore_errors=True)  # of an import that was killed
        try:
            manifest = _save(directory, source, config, scratch)
            untrusted.write_text(workdir / CONFIG, configs.to_json(config))
            untrusted.write_json(workdir / "layers.json", cost.summary(config))
            carry(source, manifest, workdir)
            _tokenizer(workdir / CARRIED / TOKENIZER, workdir, config.model.vocab_size)
            scratch.rename(workdir / "checkpoints")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return config


def _save(directory: str | Path, source: Source, config: configs.Config, scratch: Path) -> dict[str, Any]:
    """The checkpoint at step 0 in ``scratch``; returns the manifest."""
    definition = model.build(config)
    record = {"config": configs.portable(config), "layers": cost.summary(config), "fingerprint": "imported"}
    with checkpoint.Checkpoints(scratch) as saves:
        shapes = model.canonical_shapes(definition)
        leaves = saves.create(0, "params", shapes, record | {"step": 0, "format": FORMAT})

        def put(name: str, array: np.ndarray) -> None:
            with checkpoint.translated(scratch, f"{name} could not be written"):
                leaves[name][...] = array.astype(np.float32, copy=False)

        return fill(directory, source, put)


@contextlib.contextmanager
def writing(flag: str, place: Path) -> Iterator[None]:
    """What the file system refuses, as one line about ``place``."""
    try:
        yield
    except OSError as error:
        raise ConfigError(flag, str(place), f"cannot be written: {error.strerror or error}") from error


def carry(source: Source, manifest: Mapping[str, Any], workdir: Path) -> None:
    """What a Hugging Face folder holds besides parameters, and the manifest, into ``workdir``/hf."""
    carried = workdir / CARRIED
    carried.mkdir(exist_ok=True)
    for file in sorted(source.directory.iterdir()):
        if ".safetensors" in file.name or file.suffix in WEIGHTS or not file.is_file():
            continue
        inside = untrusted.inside(source.directory, file.name, "--hf")
        untrusted.write_bytes(carried / file.name, untrusted.read_bytes(inside, "--hf"))
    if json.loads((carried / CONFIG).read_bytes()) != source.values:  # of a multimodal model
        untrusted.write_json(carried / CONFIG, source.values)
    untrusted.write_json(carried / MANIFEST, manifest)
    rules = source.family.derived(model.build(source.config), source.values)
    names = {name for rule in rules for name in rule.theirs}
    kept = {name: one for name, one in manifest.items() if one["rule"] in names}
    if kept:  # another machine's exponential may differ in the last place
        written = {name: tensors.Planned(DERIVED, one["dtype"], one["shape"]) for name, one in kept.items()}
        tensors.write(carried, written, tensors.Folder(source.directory).read)


def _tokenizer(file: Path, workdir: Path, vocab_size: int) -> None:
    """Puts the folder's tokenizer beside the weights; a warning if there is none that fits."""
    fix = "texts need --tokenizer, or a tokenizer.json in the workdir"
    if not file.is_file():
        log.warning("the folder has no %s: %s", TOKENIZER, fix)
        return
    try:
        found = tokenizers.load(str(file))
    except ConfigError as error:
        log.warning("%s; %s", error, fix)
        return
    if found.vocab_size > vocab_size:
        log.warning("%s has %d ids, the model %d; %s", TOKENIZER, found.vocab_size, vocab_size, fix)
        return
    first = untrusted.read_json(file.with_name(CONFIG), "--hf", dict).get("bos_token_id")
    if isinstance(first, int) and first != found.doc_id:
        said = "texts begin with id %d, which separates documents in %s; config.json has bos_token_id %d"
        log.warning(said, found.doc_id, TOKENIZER, first)
    untrusted.write_bytes(workdir / TOKENIZER, file.read_bytes())
