"""Random overrides of a small config: every outcome is success or a ConfigError, never another exception.

    python -m tests.fuzz --cases 2000 --trace 1.0 --compile 0.01

Each case draws one to five overrides, mostly values of the right kind and some nonsense. All are resolved;
of those that pass, a part is traced (model, optimiser and training step, abstractly), and a part of these
compiled and run for one step.
"""

import argparse
import random
import sys
import traceback
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import jax
import numpy as np

from hybridlm import config as configs
from hybridlm import data, mixers, mlps, model, program, sharding
from hybridlm.errors import ConfigError
from hybridlm.fields import fields as described_fields
from tests import tiny

NONSENSE = (
    "",
    "x",
    "nan",
    "inf",
    "-inf",
    "None",
    "[]",
    "()",
    "{}",
    "1e999",
    "-7",
    "0x10",
    "é",
    "a b",
    "true",
)
NUMBERS = ("0", "1", "2", "3", "4", "8", "16", "24", "33", "64", "128", "-1", "0.5", "1e-3", "1.0", "1000")
PATTERNS = (
    "kda", "full", "(kda*2 full)*2", "gdn full/moe", "deltanet swa mla", "gla hgrn", "hgrn2 retnet*3",
    "retnet full", "full*2 kda*3", "kda/dense", "kda*0", "(kda", "kda)", "nobody", "kda/none", "*3",
)  # fmt: skip
TEXTS = ("", "~", "/nowhere", "python-stdlib:", "(64, 4)", "(16, 4), (16, 2)", "(16, 4), x")


def value(kind: Any, name: str, chance: random.Random) -> str:
    """Text for a field of annotation ``kind``."""
    if chance.random() < 0.1:
        return chance.choice(NONSENSE)
    if name == "pattern":
        return chance.choice(PATTERNS)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return value(args[0], name, chance)
    if origin is Literal:
        return str(chance.choice(args))
    if origin is tuple:
        return ", ".join(value(args[0], name, chance) for _ in range(chance.randint(0, 3)))
    if args:  # a union
        return value(chance.choice(args), name, chance)
    choices: dict[Any, tuple[str, ...]] = {bool: ("True", "False"), str: TEXTS, type(None): ("None",)}
    return chance.choice(choices.get(kind, NUMBERS))


def fields() -> dict[str, tuple[str, Any]]:
    """Every field that can be overridden: dotted name -> (last part, annotation)."""
    found = {}
    for section, described in configs.SECTIONS.items():
        found |= {f"{section}.{name}": (name, kind) for name, kind in described_fields(described).items()}
    for name, (kind, _) in configs.STANDARD.items():
        described = described_fields(mixers.config_class(kind))
        found |= {f"mixers.{name}.{field}": (field, one) for field, one in described.items()}
    for name, kind in configs.STANDARD_MLPS.items():
        described = described_fields(mlps.config_class(kind))
        found |= {f"mlps.{name}.{field}": (field, one) for field, one in described.items()}
    for module in data.KINDS.values():
        found |= {f"data.{name}": (name, kind) for name, kind in described_fields(module.Config).items()}
    kinds = {
        "data.kind": (*data.KINDS, data.MIXTURE),
        "mixers.kda.kind": mixers.kinds(),
        "mlps.dense.kind": mlps.kinds(),
    }
    return found | {name: ("kind", Literal[tuple(choices)]) for name, choices in kinds.items()}


def draw(chance: random.Random, known: Mapping[str, tuple[str, Any]]) -> dict[str, str]:
    """Overrides of one case. The model is named often, since most of what can go wrong is there."""
    names = list(known)
    weights = [4 if name.startswith(("model.", "train.", "mesh.")) else 1 for name in names]
    overrides = {}
    for name in chance.choices(names, weights, k=chance.randint(1, 5)):
        overrides[name] = value(known[name][1], known[name][0], chance)
        if chance.random() < 0.02:
            overrides[name[:-1]] = overrides.pop(name)
    return overrides


def base(text: str) -> configs.ConfigDict:
    """The tiny config with every standard mixer to choose from."""
    config = tiny.config(text)
    config.mixers, config.mlps = configs.default().mixers, configs.default().mlps
    for mixer in config.mixers.values():
        for name, size in (("num_heads", 2), ("head_dim", 8)):
            if name in mixer:
                mixer[name] = size
    return config


def attempt(values: dict[str, Any], overrides: Mapping[str, str], trace: bool, compile: bool) -> str:
    """How far a case gets: refused, resolved, traced or ran. Anything but a ConfigError comes through."""
    given = configs.ConfigDict(values).to_dict()
    try:
        for field, text in sorted(overrides.items(), key=lambda item: not item[0].endswith(".kind")):
            configs._override(given, field, text)
        config = configs.resolve(configs.ConfigDict(given))
        if not trace:
            return "resolved"
        mesh = sharding.make_mesh(config.mesh)
        configs.check_batch(config.train, mesh.shape)
        definition = model.build(config)
        with jax.set_mesh(mesh):
            built = program.build(config, definition, mesh, None)
            shape = (config.train.batch_size, config.train.seq_len)
            names = ("tokens", "targets", "segment_ids", "positions")
            if not compile:
                batch = {name: jax.ShapeDtypeStruct(shape, np.int32) for name in names}
                jax.eval_shape(built.step, built.shapes, batch)
                return "traced"
            ones = {name: np.ones(shape, np.int32) for name in names}
            state = built.init(jax.random.key(0))
            jax.block_until_ready(built.step(state, sharding.put_batch(ones, mesh)))
    except ConfigError:
        return "refused"
    return "ran"


def fuzz(text: str, cases: int, seed: int, trace: float, compile: float) -> tuple[Counter, list[str]]:
    """(outcomes, reports of what was neither success nor a ConfigError)."""
    chance, known, values = random.Random(seed), fields(), base(text).to_dict()
    outcomes: Counter = Counter()
    wrong = []
    for case in range(cases):
        overrides = draw(chance, known)
        traces = chance.random() < trace
        compiles = traces and chance.random() < compile
        try:
            outcomes[attempt(values, overrides, traces, compiles)] += 1
        except Exception as error:
            outcomes["wrong"] += 1
            where = traceback.format_exc(limit=-3)
            wrong.append(f"case {case}: {overrides}: {type(error).__name__}\n{where}")
    return outcomes, wrong


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=float, default=1.0, help="part of the valid cases that is traced")
    parser.add_argument(
        "--compile", type=float, default=0.01, help="part of the traced cases that runs a step"
    )
    flags = parser.parse_args()
    outcomes, wrong = fuzz("python-stdlib:", flags.cases, flags.seed, flags.trace, flags.compile)
    print("\n".join(wrong))
    print(
        f"seed {flags.seed}, {flags.cases} cases: " + ", ".join(f"{n} {k}" for k, n in outcomes.most_common())
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
