"""Damaged Hugging Face folders: config.json of every family, index, header, whole small models, manifests.

Nonsense is put in one to three places; config.json is read to a definition and its tensors are planned, a
folder is opened, a model imported, an imported run exported. What is accepted is what the sound one gave,
where only the JSON around it was touched.
"""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm import model
from hybridlm.convert import families, incoming, outgoing, tensors
from tests.fuzz.changes import VALUES, in_bytes, in_json

MODELS = Path(__file__).parents[1] / "golden" / "models"
SMALL = ("fla_deltanet", "kimi_linear", "qwen3_next")


def mutate(value: Any, chance: random.Random) -> Any:
    """``value`` with nonsense at one place."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        name = chance.choice(list(value))
        if chance.random() < 0.1:
            return {key: one for key, one in value.items() if key != name}
        return value | {name: mutate(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return [*value[:at], mutate(value[at], chance), *value[at + 1 :]]
    return copy.deepcopy(chance.choice(VALUES))


class Cases:
    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes = json.loads((MODELS / "shapes.json").read_text())
        self.sound = {name: self.filled(MODELS / name) for name in SMALL}
        self.run = folder / "run"
        incoming.import_hf(MODELS / "fla_deltanet", self.run)
        self.exported = self.export(self.run)

    def __call__(self, chance: random.Random) -> str:
        names = ("config", "config", "index", "header", "header", "whole", "whole", "manifest")
        name = chance.choice(names)
        scratch = self.folder / "case"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        getattr(self, name)(chance, scratch)
        return f"{name} accepted"

    def config(self, chance: random.Random, folder: Path) -> None:
        values = copy.deepcopy(chance.choice(list(self.shapes.values()))["config"])
        for _ in range(chance.randint(1, 3)):
            values = mutate(values, chance)
        (folder / "config.json").write_text(json.dumps(values))
        source = families.read_config(folder)
        definition = model.build(source.config)
        if len(definition.layers) <= 8 and source.config.model.d_model <= 4096:
            families.plan(definition, source.family, source.values)
            written = source.family.write(definition, source.model_type)
            source.family.architecture(written).config()

    def index(self, chance: random.Random, folder: Path) -> None:
        values: Any = {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
        for _ in range(chance.randint(1, 2)):
            values = mutate(values, chance)
        (folder / tensors.INDEX).write_text(json.dumps(values))
        for name in "ab":
            planned = {name: tensors.Planned(f"{name}.safetensors", "F32", (2,))}
            tensors.write(folder, planned, lambda name: np.zeros(2, np.float32))
        held = tensors.Folder(folder)
        assert set(held.tensors) == set(values["weight_map"])

    def header(self, chance: random.Random, folder: Path) -> None:
        entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
        values: Any = {"a": entry, "__metadata__": {"format": "pt"}}
        for _ in range(chance.randint(1, 2)):
            values = mutate(values, chance)
        text = json.dumps(values).encode()
        if chance.random() < 0.2:
            cut = chance.randrange(len(text))
            text = text[:cut] + bytes([chance.randrange(256)]) + text[cut + 1 :]
        length = len(text) if chance.random() < 0.9 else chance.choice((0, 1, 2**40, 2**63))
        (folder / tensors.SINGLE).write_bytes(length.to_bytes(8, "little") + text + bytes(24))
        held = tensors.Folder(folder)
        for name, tensor in held.tensors.items():
            if tensor.dtype in tensors.DTYPES:
                assert held.read(name).shape == tensor.shape

    def whole(self, chance: random.Random, folder: Path) -> None:
        """A model of public weights, damaged anywhere, to parameters."""
        name = chance.choice(SMALL)
        for file in ("config.json", tensors.SINGLE):
            shutil.copy(MODELS / name / file, folder)
        path = folder / chance.choice(("config.json", tensors.SINGLE))
        content, arrays = path.read_bytes(), False
        if path.suffix == ".json":
            path.write_text(json.dumps(mutate(json.loads(content), chance)))
        elif chance.random() < 0.6:
            length = int.from_bytes(content[:8], "little")
            text = json.dumps(in_json(json.loads(content[8 : 8 + length]), chance)).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        else:
            path.write_bytes(in_bytes(content, chance))
            arrays = True  # the format has no sums
        found = self.filled(folder)
        expected = self.sound[name]
        if not arrays and path.suffix != ".json":
            assert found.keys() == expected.keys(), "other parameters"
            assert all(np.array_equal(found[one], expected[one]) for one in found), "other numbers"

    def filled(self, folder: Path) -> dict[str, np.ndarray]:
        source = families.read_config(folder)
        found: dict[str, np.ndarray] = {}
        incoming.fill(folder, source, found.__setitem__)
        return found

    def manifest(self, chance: random.Random, folder: Path) -> None:
        """An imported run whose notes about the public checkpoint are damaged, exported."""
        run = folder / "run"
        shutil.copytree(self.run, run)
        path = run / "hf" / chance.choice(("manifest.json", "config.json"))
        changed = in_json if chance.random() < 0.6 else mutate
        if chance.random() < 0.8:
            path.write_text(json.dumps(changed(json.loads(path.read_bytes()), chance)))
        else:
            path.write_bytes(in_bytes(path.read_bytes(), chance))
        found = self.export(run)
        assert found.keys() == self.exported.keys(), f"other tensors: {found.keys() ^ self.exported.keys()}"
        here = {one.relative_to(folder).parts[0] for one in folder.rglob("*")}
        assert here <= {"run", "out"}, f"written elsewhere: {here}"

    def export(self, run: Path) -> dict[str, tensors.Tensor]:
        out = run.parent / "out"
        outgoing.export_hf(str(run), str(out))
        found = dict(tensors.Folder(out).tensors)
        families.read_config(out)
        shutil.rmtree(out)
        return found


def cases(folder: Path) -> Callable[[random.Random], str]:
    return Cases(folder)
