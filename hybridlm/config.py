"""Configs: files and command-line overrides in, one complete and checked tree of dataclasses out.

A config file is Python with ``get_config()`` or ``get_config(arg)`` that starts from `default` and changes
what it is about; up to here it is ml_collections. `resolve` checks everything, fills in what follows from
the rest, and makes the `Config` that all other code reads: nothing there asks whether a setting makes sense.

    config = resolve(load("configs/hybrid.py:340m,kda,3:1", {"train.steps": "100"}))
    config.mixers["kda"].head_dim
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from ml_collections import ConfigDict, FrozenConfigDict

from hybridlm import config_file, mixers, mlps, mup, objectives, pattern, qk_clip, schema, stages, untrusted
from hybridlm import data as data_kinds
from hybridlm.errors import ConfigError, nearest
from hybridlm.fields import Named, build, checked, fields, mapping, parse, plain, under
from hybridlm.run import private
from hybridlm.schema import SECTIONS

MLP_MULTIPLE = 256  # FLA and Llama round the SwiGLU width up to it
LAYERS = {"mixers": mixers, "mlps": mlps}  # sections of definitions by name, and where their kinds are
NAMED = LAYERS | {"val": data_kinds}
ONE = {"data": data_kinds, "objective": objectives}  # sections that are one definition
KNOWN = (*SECTIONS, *NAMED, *ONE)
ALONE = ("init_from", "init_gates")  # in no section
MOVED = {"train.z_loss": "objective.z_loss"}  # since 0.1.0

# Mixers that every config has from `default`, so that any pattern can be tried from the command line.
STANDARD: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("attention", {}),
    "swa": ("attention", {"window": 512}),
    "fox": ("attention", {"forget_gate": True, "rope_theta": 0.0}),
    "deltanet": ("delta_net", {}),
    "gdn": ("gated_delta_net", {}),
    "gdn2": ("gated_delta_net2", {}),
    "deltaproduct": ("delta_product", {}),
    "gdp": ("gated_delta_product", {}),
    "featuremap": ("feature_map", {}),
    "gatedconv": ("gated_conv", {}),
    "loglinear": ("log_linear", {}),
    "sharedblock": ("shared_block", {}),
}
OWN_NAMES = (
    "mla", "parallel", "kda", "gla", "hgrn", "hgrn2", "retnet", "mamba2", "mamba", "lightning", "rglru",
    "mlstm", "based", "comba", "rwkv6", "rwkv7", "s4d", "mom", "sse",
)  # fmt: skip
STANDARD |= {kind: (kind, {}) for kind in OWN_NAMES}
STANDARD_MLPS = {"dense": "swiglu", "moe": "moe", "channel_mix": "channel_mix", "none": "none"}


@dataclasses.dataclass(frozen=True)
class Config:
    """A resolved config. Definitions are instances of their kind's ``Config``: ``config.mixers["kda"]``.

    mixers, mlps: those that the pattern uses.
    val: data of which the held-out part is validated on beside that of ``data``: metrics val/<name>/loss.
    init_from: a run's workdir or a Hugging Face directory to take the first parameters from; "": none.
    init_gates: what gates of matrix states start as that take the place of attention of ``init_from``: near,
        such that the layer is near attention, or keys, a decay of the attention's keys (Liger).
    stages: parts of the run with settings of their own (`hybridlm.stages`); empty: it has none.
    """

    model: schema.Model
    optimizer: schema.Optimizer
    train: schema.Train
    mesh: schema.Mesh
    checkpoint: schema.Checkpoint
    log: schema.Log
    eval: schema.Eval
    mixers: Named[mixers.Config]
    mlps: Named[mlps.Config]
    data: data_kinds.Config
    objective: objectives.Config
    val: Named[data_kinds.Config]
    init_from: str = ""
    init_gates: Literal["near", "keys"] = "near"
    stages: Named[Any] = dataclasses.field(default_factory=Named)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain values, from which `resolve` makes the same again."""
        quiet = {"stages": {}, "init_gates": "near"}  # left out where they are what they always were
        return {name: value for name, value in plain(self).items() if value != quiet.get(name, ...)}

    def replace(self, **fields: Any) -> "Config":
        """With other values, fields written with a double underscore: ``train__steps=3``."""
        sections: dict[str, Any] = {}
        for name, value in fields.items():
            section, _, field = name.partition("__")
            old = sections.get(section, getattr(self, section))
            sections[section] = dataclasses.replace(old, **{field: value}) if field else value
        return dataclasses.replace(self, **sections)


def default() -> ConfigDict:
    """Every section with its defaults (`hybridlm.schema`), and the STANDARD mixers and MLPs."""
    config = ConfigDict({name: dataclasses.asdict(section()) for name, section in SECTIONS.items()})
    config.mixers = ConfigDict({name: mixer(kind, **settings) for name, (kind, settings) in STANDARD.items()})
    config.mlps = ConfigDict({name: mlp(kind) for name, kind in STANDARD_MLPS.items()})
    config.data = data("text")
    config.val = ConfigDict()
    config.objective = objective("next_token")
    config.init_from = ""
    return config


def mixer(kind: str, **settings: Any) -> ConfigDict:
    """A definition for ``config.mixers``: the kind with every one of its settings, ``settings`` put in.

    kind: a module of `hybridlm.mixers`, or "module:Class" of a mixer that lives anywhere else.
    """
    return _written("mixers", kind, settings)


def mlp(kind: str, **settings: Any) -> ConfigDict:
    """A definition for ``config.mlps``, likewise."""
    return _written("mlps", kind, settings)


def data(kind: str, **settings: Any) -> ConfigDict:
    """A definition for ``config.data``, likewise.

    Kind "mixture" takes ``components``: name -> a definition, of which ``weight`` is the share.
    """
    return _written("data", kind, settings)


def objective(kind: str, **settings: Any) -> ConfigDict:
    """The definition of ``config.objective``, likewise."""
    return _written("objective", kind, settings)


def _written(section: str, kind: str, settings: Mapping[str, Any]) -> ConfigDict:
    given = ConfigDict({"kind": kind, **settings}).to_dict()
    return ConfigDict(plain(_definition(section, given, f"{section}({kind!r})")))


# Reading files and overrides.


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """The config of ``spec``, "file.py", "file.py:argument" or a run's "config.json", with overrides applied.

    overrides: dotted field -> text as on a command line. Every ``<definition>.kind`` comes first and puts
        that kind's defaults in place; a name that the file does not have is thereby defined.
    Runs the file: a config is Python and can do whatever Python can (a config.json cannot, unless it names
    a mixer outside the package, whose module is then imported).
    """
    values = config_file.read(spec).to_dict()
    for field, text in sorted((overrides or {}).items(), key=lambda item: not item[0].endswith(".kind")):
        _override(values, field, text)
    return ConfigDict(values)


def _override(config: dict[str, Any], field: str, text: str) -> None:
    if field in ALONE:
        config[field] = text
        return
    if field.startswith("stages."):
        stages.override(config, field, text)
        return
    *path, name = MOVED.get(field, field).split(".")
    section, depth = path[0] if path else name, len(path)
    if section not in KNOWN:
        raise ConfigError(field, text, f"there is no section {section!r}", nearest(section, KNOWN))
    component = section == "data" and depth == 3 and path[1] == "components"
    if depth != (2 if section in NAMED else 1) and not component:
        form = f"{section}.<name>.<setting>" if section in NAMED else f"{section}.<field>"
        form += " or data.components.<name>.<field>" if section == "data" else ""
        raise ConfigError(field, text, f"fields here are {form}")
    owner, prefix = config, ".".join(path)
    for key in path[:-1]:
        owner = owner.setdefault(key, {})
    if name == "kind" and section not in SECTIONS:
        kept = {"weight": owner[path[-1]].get("weight", 1.0)} if component and path[-1] in owner else {}
        owner[path[-1]] = plain(_definition(section, {"kind": text, **kept}, prefix))
        return
    if section not in SECTIONS and path[-1] not in owner:
        raise ConfigError(field, text, f"there is no {prefix}", nearest(path[-1], owner))
    target = owner.setdefault(path[-1], {})
    with under(prefix):
        described = fields(SECTIONS.get(section) or _class(section, target))
    if name not in described or name == "components":
        raise ConfigError(field, text, "no such field", nearest(name, described))
    target[name] = checked(field, described[name], text, parse)


# Checking.


def resolve(given: ConfigDict | FrozenConfigDict | Config) -> Config:
    """The complete, checked config: what `model.build`, `data.build` and `trainer.train` take.

    Fills in defaults of fields that are missing, the number of layers and the MLP width; leaves out mixers
    and MLPs that the pattern does not use. Resolving twice changes nothing. Raises ConfigError.
    """
    if isinstance(given, Config):
        return given
    values = given.to_dict()
    _move(values)
    known = fields(Config)
    alone = {name: checked(name, known[name], values.pop(name)) for name in ALONE if name in values}
    parts = values.pop("stages", {})
    mapping(parts, "stages")
    for name, section in values.items():
        if name not in KNOWN:
            raise ConfigError(name, section, "there is no such section", nearest(name, KNOWN))
        mapping(section, name)
    sections: dict[str, Any] = {}
    for name, described in SECTIONS.items():
        sections[name] = build(described, values.get(name, {}), name)
        with under(name):
            getattr(sections[name], "check", lambda: None)()
    axes = sections["mesh"].sizes()
    check_batch(sections["train"], {axis: max(1, size) for axis, size in axes.items()})
    definitions = {
        section: {
            name: _definition(section, definition, f"{section}.{name}")
            for name, definition in sorted(values.get(section, {}).items())
        }
        for section in NAMED
    }
    names = pattern.parse(sections["model"].pattern, *(definitions[section] for section in LAYERS))
    model = _filled(sections["model"], names, definitions["mixers"])
    layers = pattern.fill(names, model.num_layers)
    for at, (section, found) in enumerate((section, definitions[section]) for section in LAYERS):
        used = {pattern.split(layer)[at] for layer in layers}
        used = mixers.with_parts(used, definitions["mixers"]) if section == "mixers" else used
        sections[section] = Named({name: one for name, one in found.items() if name in used})
        for name, one in sections[section].items():
            with under(f"{section}.{name}"):
                one.check(model.d_model)
    mixers.check_together(layers, sections["mixers"], definitions["mixers"], model.d_model)
    mup.check(model, sections["mixers"])
    qk_clip.check(sections["optimizer"].qk_clip, sections["mixers"], model.d_model)
    for section, kind in (("data", "text"), ("objective", "next_token")):
        sections[section] = _definition(section, values.get(section, {"kind": kind}), section)
        with under(section):
            sections[section].check()
    sections |= {"model": model, "val": Named(definitions["val"])}
    return stages.complete(Config(**sections, **alone), parts, resolve)


def _move(values: dict[str, Any]) -> None:
    """Fields of older configs, to where they are now."""
    for old, new in MOVED.items():
        (section, field), (to, name) = old.split("."), new.split(".")
        if isinstance(values.get(section), dict) and field in values[section]:
            value = values[section].pop(field)
            values.setdefault(to, {"kind": "next_token"})[name] = value


def _filled(model: schema.Model, names: tuple[str, ...], known: Mapping[str, Any]) -> schema.Model:
    """``model`` with what follows from the rest."""
    _check_norms(model, {pattern.split(name)[0] for name in names}, known)
    hidden = model.mlp_hidden or mlp_hidden(model.d_model)
    layers = len(pattern.fill(names, model.num_layers))
    return dataclasses.replace(model, num_layers=layers, mlp_hidden=hidden)


def _check_norms(model: schema.Model, used: Collection[str], known: Mapping[str, Any]) -> None:
    """``post_norm`` and ``stream_norm`` name what there is, and not the same. used: mixers of layers."""
    bare = {name for name in used if known[name].norms_itself}
    for name in model.post_norm:
        if name not in known:
            problem = f"no mixer named {name!r} in mixers"
            raise ConfigError("model.post_norm", model.post_norm, problem, nearest(name, known))
        if name in bare:
            raise ConfigError("model.post_norm", model.post_norm, f"{name} norms what it is given itself")
    for one, *_ in model.streams():
        named = {name for name in used for half in ("mixer", "mlp") if fnmatchcase(f"{name}.{half}", one)}
        if not named:
            fix = "Names are full.mixer, full.mlp ...; * stands for anything."
            raise ConfigError("model.stream_norm", one, "is the name of no half of a block", fix)
        if own := sorted(name for name in bare if fnmatchcase(f"{name}.mixer", one)):
            problem = f"norms the stream of {own[0]}, which norms what it is given itself"
            raise ConfigError("model.stream_norm", one, problem, "Name the other halves.")
        if both := sorted(named.intersection(model.post_norm)):
            problem = f"norms the stream of {both[0]}, whose blocks norm what is added (model.post_norm)"
            raise ConfigError("model.stream_norm", one, problem, "Leave it out of one of them.")


def mlp_hidden(d_model: int) -> int:
    """SwiGLU width for an MLP of 8 d_model^2 parameters: 8/3 d_model, rounded up (FLA's hidden_ratio 4)."""
    return -(-(8 * d_model // 3) // MLP_MULTIPLE) * MLP_MULTIPLE


def check_batch(train: schema.Train, mesh: Mapping[str, int]) -> None:
    """A microbatch must split over the mesh axes data and fsdp, rows over context. mesh: sizes without -1."""
    if train.batch_size // train.microbatches % (mesh["data"] * mesh["fsdp"]):
        product = f"{train.microbatches} * {mesh['data']} * {mesh['fsdp']}"
        problem = f"must be a multiple of train.microbatches * mesh.data * mesh.fsdp = {product}"
        raise ConfigError("train.batch_size", train.batch_size, problem)
    blocks = 2 * mesh.get("context", 1)
    if blocks > 2 and train.seq_len % blocks:
        problem = f"must be a multiple of 2 * mesh.context = {blocks}: rows are cut into two blocks a device"
        raise ConfigError("train.seq_len", train.seq_len, problem)


def _class(section: str, values: Mapping[str, Any]) -> type:
    """The dataclass of a definition, which depends on its kind."""
    return (NAMED | ONE)[section].config_class(str(values.get("kind")))


def _definition(section: str, values: Any, prefix: str) -> Any:
    """A mixer's, an MLP's, the data's or the objective's settings, complete."""
    if section in ("data", "val"):
        return data_kinds.settings(values, prefix)
    mapping(values, prefix)
    owner, _, name = prefix.partition(".")
    if owner in NAMED and not pattern.nameable(name):
        raise ConfigError(prefix, name, "no pattern can name it", "Use letters, digits and _ only.")
    with under(prefix):
        described = _class(section, values)
    return build(described, values, prefix)


# config.json


def portable(config: Config) -> dict[str, Any]:
    """The config as it is written down: paths without home directory and user name."""
    return private.in_paths(config.to_dict(), private.hide)


def to_json(config: Config) -> str:
    return json.dumps(portable(config), indent=2) + "\n"


def to_yaml(config: Config) -> str:
    """What a person reads."""
    return yaml.safe_dump(untrusted.parse(to_json(config)), sort_keys=False, allow_unicode=True)


def of_run(workdir: str | Path) -> Config:
    """The config of the run in ``workdir``; ConfigError where there is none."""
    path = Path(workdir) / "config.json"
    if not path.is_file() and config_file.recorded(path) is None:
        fix = "Name a directory that train.py wrote."
        raise ConfigError("--workdir", str(workdir), "holds no config.json", fix)
    return resolve(config_file.from_json(path))
