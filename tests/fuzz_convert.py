"""Damaged Hugging Face folders: every outcome is success or a ConfigError, never another exception.

    python -m tests.fuzz_convert --cases 2000

A case takes the config.json of a family, an index or a safetensors header, and puts nonsense in one to three
places; config.json is read to a definition and its tensors are planned, a folder is opened.
"""

import argparse
import copy
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm import model
from hybridlm.convert import families, tensors
from hybridlm.convert.fields import Fields
from hybridlm.errors import ConfigError

SHAPES = json.loads((Path(__file__).parent / "golden" / "models" / "shapes.json").read_text())
NONSENSE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 10**30, 0.5, -0.0, 1e300, float("inf"), float("nan"), "",
    "x", "é\x1b[2J", [], [0], [None], ["x"], [[]], {}, {"a": 1}, {"layers": [0], "num_heads": 2}, "../x",
    "/etc/passwd",
)  # fmt: skip


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
    return copy.deepcopy(chance.choice(NONSENSE))


def config(chance: random.Random, folder: Path) -> None:
    values = copy.deepcopy(chance.choice(list(SHAPES.values()))["config"])
    for _ in range(chance.randint(1, 3)):
        values = mutate(values, chance)
    (folder / "config.json").write_text(json.dumps(values))
    source = families.read_config(folder)
    definition = model.build(source.config)
    if len(definition.layers) <= 8 and source.config.model.d_model <= 4096:
        families.plan(definition, source.family)
        written = source.family.write(definition, source.model_type)
        source.family.read(Fields(written)).config()


def index(chance: random.Random, folder: Path) -> None:
    values: Any = {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    for _ in range(chance.randint(1, 2)):
        values = mutate(values, chance)
    (folder / tensors.INDEX).write_text(json.dumps(values))
    for name in "ab":
        planned = {name: tensors.Planned(f"{name}.safetensors", "F32", (2,))}
        tensors.write(folder, planned, lambda name: np.zeros(2, np.float32))
    tensors.Folder(folder)


def header(chance: random.Random, folder: Path) -> None:
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
            held.read(name)


KINDS = (config, index, header)


def fuzz(cases: int, seed: int) -> tuple[Counter, list[str]]:
    """(outcomes, reports of what was neither success nor a ConfigError)."""
    chance = random.Random(seed)
    outcomes: Counter = Counter()
    wrong = []
    for case in range(cases):
        kind = chance.choice(KINDS)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                kind(chance, Path(scratch))
                outcomes[f"{kind.__name__} accepted"] += 1
            except ConfigError as error:
                outcomes[f"{kind.__name__} refused"] += 1
                if "\x1b" in str(error):
                    wrong.append(f"case {case}: an escape in {error!r}")
            except Exception as error:
                outcomes["wrong"] += 1
                wrong.append(
                    f"case {case}, {kind.__name__}: {type(error).__name__}\n{traceback.format_exc(limit=-4)}"
                )
    return outcomes, wrong


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz_convert")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    outcomes, wrong = fuzz(flags.cases, flags.seed)
    print("\n".join(wrong))
    print(
        f"seed {flags.seed}, {flags.cases} cases: " + ", ".join(f"{n} {k}" for k, n in outcomes.most_common())
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
