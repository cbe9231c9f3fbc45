"""Random overrides of small configs: plain, with stages and a teacher, with several sets of data.

Each case draws one to five overrides, mostly values of the right kind and some nonsense. All are resolved,
and what resolves must be written down and read back as the same; of those a part is opened (data, tokens,
cost) and traced (model, optimiser and training step, abstractly), and a part of these runs a step.
"""

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import jax
import numpy as np

from hybridlm import config as configs
from hybridlm import (
    cost,
    data,
    init_from,
    kinds,
    member,
    mixers,
    mlps,
    model,
    objectives,
    program,
    sharding,
    stages,
    untrusted,
)
from hybridlm.convert import families
from hybridlm.fields import fields as described_fields
from tests import tiny
from tests.fuzz.changes import VALUES

NONSENSE = ("", "x", "nan", "inf", "-inf", "None", "[]", "()", "{}", "1e999", "-7", "0x10", "é", "a b",
            "true", "１２", "1_0", "\x1b[31m", "9" * 400)  # fmt: skip
NUMBERS = ("0", "1", "2", "3", "4", "8", "16", "24", "33", "64", "128", "-1", "0.5", "1e-3", "1.0", "1000")
PATTERNS = (
    "kda", "full", "(kda*2 full)*2", "gdn full/moe", "deltanet swa mla", "gla hgrn", "hgrn2 retnet*3",
    "retnet full", "full*2 kda*3", "kda/dense", "kda*0", "(kda", "kda)", "nobody", "kda/none", "*3",
    "full:a full@a", "mla:x kda mla@x/moe", "swa:b (swa@b full@b)*2", "full@a", "kda:a full@a",
    "full:a mla@a", "parallel*2", "parallel full:a swa@a", "parallel:a parallel@a", "based comba",
    "rwkv6 rwkv7*2", "mamba",
    "mamba2 mlstm", "lightning rglru", "deltaproduct gdp", "gdn2 featuremap", "fox fox/none", "rwkv7 hgrn",
)  # fmt: skip
TEXTS = (
    "",
    "~",
    "/nowhere",
    "(64, 4)",
    "(16, 4), (16, 2)",
    "(16, 4), x",
    "full",
    "a\nb",
    "*",
    "x:ema",
    "a/b:c",
)
BY_NAME = {
    "pattern": PATTERNS,
    "groups": ("layers.*.mlp.*=0.5", "embedding=0.1/0", "*=1", "*=0/0", "nobody=2", "=1", "a=b", "*=1e99",
               "layers.0.*=2, layers.*=3", "layers.1.*=0.5", "*=99999/99999", "a=1=2", "*=-1"),
    "freeze": ("*", "layers.*", "layers.0.*", "nobody.*", "embedding, head", "layers.*.mixer.*", "[",
               "layers.1.*"),
    "branches": ("kda, full", "full, full", "hgrn, full", "parallel, kda", "full", "rwkv7, swa",
                 "nobody, full", "mla, mamba2, gla"),
    "multipliers": ("1, 2", "0, 0", "1", "nan, 1", "-1e9, 1e9", "1e300, 1"),
    "order": ("a", "a, b", "b, a", "a, a", "c", "", "order", "a, b, c"),
    "ema": ("0", "0.5", "0.999", "1", "0.9999999", "-1"),
    "profile_steps": ("1, 2", "2, 1", "0, 1", "1", "3, 3", "1, 99", "1, 2, 3"),
    "post_norm": ("full", "kda, full", "nobody", "full, full"),
    "stream_norm": ("*=1", "full.mixer=2/0.5", "*.mlp=3.5566", "nobody.mlp=1", "*=0", "*=1, full.mlp=99999",
                    "full=1", "=1", "*=1e-9/1e-9", "[=1"),
    "yarn": ("40, 4096", "1, 1", "4, 16, 2, 1, 1, 0.5", "4", "0.5, 8", "4, 8, 1, 2", "1e9, 1e9",
             "2, 8, 1, 1, 0, 0"),
    "mup_base_width": ("0", "1", "8", "16", "32", "2147483647", "-1"),
    "tasks": ("mqar_4", "parity", "nobody", "mqar_4, mqar_4", "mqar_4, parity"),
    "qk_clip": ("0", "1", "100", "1e9", "1e-9", "-1"),
    "num_pairs": ("1", "4", "64", "0"),
}  # fmt: skip
STAGES = ("train", "optimizer", "objective")


def value(kind: Any, name: str, chance: random.Random) -> str:
    """Text for a field of annotation ``kind``."""
    if chance.random() < 0.1:
        return chance.choice(NONSENSE)
    if name in BY_NAME and chance.random() < 0.9:
        return chance.choice(BY_NAME[name])
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return value(args[0], name, chance)
    if origin is Literal:
        return str(chance.choice(args))
    if origin is tuple:
        return ", ".join(value(args[0], "", chance) for _ in range(chance.randint(0, 3)))
    if args:  # a union
        return value(chance.choice(args), name, chance)
    choices: dict[Any, tuple[str, ...]] = {bool: ("True", "False"), str: TEXTS, type(None): ("None",)}
    return chance.choice(choices.get(kind, NUMBERS))


def fields(values: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Every field of the config ``values`` that can be overridden: dotted name -> (last part, annotation)."""
    found: dict[str, tuple[str, Any]] = {"init_from": ("", str)}

    def add(prefix: str, described: type) -> None:
        found.update({f"{prefix}.{name}": (name, one) for name, one in described_fields(described).items()})

    for section, described in configs.SECTIONS.items():
        add(section, described)
    for name in values["mixers"]:
        add(f"mixers.{name}", mixers.config_class(values["mixers"][name]["kind"]))
    for name in values["mlps"]:
        add(f"mlps.{name}", mlps.config_class(values["mlps"][name]["kind"]))
    for described in data.KINDS.values():
        for prefix in ("data", "data.components.one", *(f"val.{name}" for name in values["val"])):
            add(prefix, described)
    for kind in kinds.names(objectives):
        add("objective", objectives.config_class(kind))
    if "stages" in values:
        found["stages.order"] = ("order", tuple[str, ...])
        for section in STAGES:
            known = {name: one for name, one in found.items() if name.startswith(f"{section}.")}
            found |= {f"stages.{stage}.{name}": one for name, one in known.items() for stage in "ab"}
    of_data = (*data.KINDS, "nobody")
    choices_of = {
        "data.kind": of_data, "val.new.kind": of_data, "data.components.one.kind": of_data,
        "mixers.kda.kind": mixers.kinds(), "mixers.new.kind": (*mixers.kinds(), "os:path", "a:b", ":"),
        "mlps.dense.kind": kinds.names(mlps), "objective.kind": (*kinds.names(objectives), "x"),
    }  # fmt: skip
    return found | {name: ("kind", Literal[tuple(choices)]) for name, choices in choices_of.items()}


def draw(chance: random.Random, known: Mapping[str, tuple[str, Any]]) -> dict[str, str]:
    """Overrides of one case. The model is named often, since most of what can go wrong is there."""
    names = list(known)
    often = ("model.", "train.", "mesh.", "optimizer.", "objective.", "stages.order")
    weights = [6 if name.startswith(often) or name in configs.MOVED else 1 for name in names]
    overrides = {}
    for name in chance.choices(names, weights, k=chance.choice((1, 1, 2, 3, 5))):
        overrides[name] = value(known[name][1], known[name][0], chance)
        if chance.random() < 0.02:
            overrides[name[:-1]] = overrides.pop(name)
    return overrides


def bases(folder: Path) -> list[dict[str, Any]]:
    """The tiny config with every standard mixer to choose from; the others beside it."""
    text = tiny.write_text(folder)
    plain = tiny.config(text)
    plain.mixers, plain.mlps = configs.default().mixers, configs.default().mlps
    for mixer in plain.mixers.values():
        for name, size in (("num_heads", 2), ("head_dim", 8), ("state_size", 8), ("d_state", 8)):
            if name in mixer:
                mixer[name] = size
    teacher = folder / "teacher"
    (teacher / "checkpoints").mkdir(parents=True)
    theirs = configs.resolve(tiny.config(text, model__pattern="full*2"))
    (teacher / "config.json").write_text(configs.to_json(theirs))
    taught = plain.copy_and_resolve_references()
    taught.model.pattern, taught.mixers.full = "full kda", tiny.config(text).mixers.full
    taught.objective = configs.objective("distil", teacher=str(teacher), next_token=0.5)
    taught.stages = {
        "order": ("a", "b"),
        "a": {"train": {"steps": 2}, "objective": {"kl": 0.0, "transfer": 1.0}},
        "b": {"train": {"steps": 3, "seq_len": 8}, "objective": {"kind": "next_token"}},
    }
    several = plain.copy_and_resolve_references()
    several.val = {"other": configs.data("text", path=text, holdout=0.5), "task": configs.data("mqar")}
    parts = {"one": configs.data("text", path=text, holdout=0.3), "two": configs.data("text", path=text)}
    several.data = configs.data("mixture", components=parts)
    several.optimizer.update(name="muon", ema=0.5, groups=("layers.*=0.5",))
    several.model.mup_base_width = 8
    return [plain.to_dict(), plain.to_dict(), taught.to_dict(), several.to_dict()]


def resolved(values: dict[str, Any]) -> configs.Config:
    """The config, which must mean the same when it is written down and read."""
    config = configs.resolve(configs.ConfigDict(values))
    again = configs.resolve(configs.ConfigDict(untrusted.parse(configs.to_json(config))))
    assert configs.portable(again) == configs.portable(config), "config.json reads back as another config"
    assert hash(config) is not None and configs.to_yaml(config)
    return config


def opened(config: configs.Config) -> None:
    """What is looked at before anything is compiled: data, cost, public formats."""
    datasets = [member.build_data(config, split) for split in ("train", "val")]
    datasets += [member.val_set(config, name, datasets[0], None) for name in config.val]
    for dataset in datasets:
        batch = dataset.batch(0)
        low, high = batch["tokens"].min(), batch["tokens"].max()
        assert low >= 0 and high < config.model.vocab_size, f"tokens {low} to {high}"
        assert batch["targets"].max() < config.model.vocab_size and dataset.source.describe()
    summary = cost.summary(config)
    sizes = [math.prod(one.shape) for one in model.canonical_shapes(model.build(config)).values()]
    assert summary["parameters"] == sum(sizes), f"{summary['parameters']} parameters, of sizes {sum(sizes)}"
    flops = cost.train_flops_per_token(config)
    assert math.isfinite(flops) and flops > 0 and min(summary["state_bytes"], summary["cache_bytes"]) >= 0
    families.public_format(config)


def traced(config: configs.Config, begin: int, compile: bool) -> None:
    mesh = sharding.make_mesh(config.mesh)
    configs.check_batch(config.train, mesh.shape)
    with jax.set_mesh(mesh):
        built = program.build(config, model.build(config), mesh, None, begin=begin)
        shape = (config.train.batch_size, config.train.seq_len)
        names = ("tokens", "targets", "segment_ids", "positions")
        batch = {name: jax.ShapeDtypeStruct(shape, np.int32) for name in names}
        jax.eval_shape(built.evaluate, built.shapes["params"], batch, *built.teacher)
        if not compile or built.teacher:
            jax.eval_shape(built.step, built.shapes, batch, *built.teacher)
            return
        ones = {name: np.ones(shape, np.int32) for name in names}
        state = built.init(jax.random.key(0))
        jax.block_until_ready(built.step(state, sharding.put_batch(ones, mesh)))


def odd(values: dict[str, Any], chance: random.Random) -> None:
    """A Python value in place of one that a file or a config.json gives."""
    owner: Any = values
    while True:
        name = chance.choice(list(owner))
        if not isinstance(owner[name], dict) or not owner[name] or chance.random() < 0.1:
            break
        owner = owner[name]
    if chance.random() < 0.2:
        owner[chance.choice(("x", "kind", "order", "steps"))] = chance.choice(VALUES)
    else:
        owner[name] = chance.choice(VALUES)


def cases(folder: Path, trace: float = 0.1, compile: float = 0.03) -> Callable[[random.Random], str]:
    given = bases(folder)
    known = [fields(values) for values in given]

    def case(chance: random.Random) -> str:
        which = chance.randrange(len(given))
        values = configs.ConfigDict(given[which]).to_dict()
        traces = chance.random() < trace
        compiles = traces and chance.random() < compile
        if chance.random() < 0.15:
            for _ in range(chance.randint(1, 3)):
                odd(values, chance)
        else:
            overrides = draw(chance, known[which])
            for field, text in sorted(overrides.items(), key=lambda item: not item[0].endswith(".kind")):
                configs._override(values, field, text)
        config = resolved(values)
        if config.init_from:
            init_from.described(config.init_from)
        if not traces:
            return "resolved"
        opened(config)
        for begin, one in stages.split(config, configs.resolve):
            traced(one, begin, compiles)
        return "ran" if compiles else "traced"

    return case
