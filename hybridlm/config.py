"""Configs: files and command-line overrides in, one complete and checked config out.

A config file is Python with ``get_config()`` or ``get_config(arg)`` that starts from `default` and changes
what it is about. `load` reads it and applies overrides; `resolve` checks everything and fills in what follows
from the rest. Nothing after `resolve` has to ask whether a setting is there or makes sense.

    config = resolve(load("configs/hybrid.py:340m,kda,3:1", {"train.steps": "100"}))
"""

import contextlib
import dataclasses
import inspect
import json
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from hybridlm import data as data_kinds
from hybridlm import mixers, mlps, pattern, schema
from hybridlm.errors import ConfigError, nearest
from hybridlm.run import private

MLP_MULTIPLE = 256  # FLA and Llama round the SwiGLU width up to it
MIXTURE = data_kinds.MIXTURE
SECTIONS = (*schema.SECTIONS, "mixers", "mlps", "data")
KINDS = {"mixers": mixers, "mlps": mlps}  # sections of named definitions, and where their kinds are

# Mixers that every config has from `default`, so that any pattern can be tried from the command line.
STANDARD: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("attention", {}),
    "swa": ("attention", {"window": 512}),
    "mla": ("mla", {}),
    "deltanet": ("delta_net", {}),
    "gdn": ("gated_delta_net", {}),
    "kda": ("kda", {}),
    "gla": ("gla", {}),
    "hgrn": ("hgrn", {}),
    "hgrn2": ("hgrn2", {}),
    "retnet": ("retnet", {}),
}
STANDARD_MLPS = {"dense": "swiglu", "moe": "moe"}


def default() -> ConfigDict:
    """Every section with its defaults (`hybridlm.schema`), and the STANDARD mixers and MLPs.

    init_from: a run's workdir or a Hugging Face directory to take the first parameters from; "": none.
    """
    config = ConfigDict({name: dataclasses.asdict(section()) for name, section in schema.SECTIONS.items()})
    config.mixers = ConfigDict({name: mixer(kind, **settings) for name, (kind, settings) in STANDARD.items()})
    config.mlps = ConfigDict({name: mlp(kind) for name, kind in STANDARD_MLPS.items()})
    config.data = data("text")
    config.init_from = ""
    return config


def mixer(kind: str, **settings: Any) -> ConfigDict:
    """A definition for ``config.mixers``: the kind with every one of its settings, ``settings`` put in."""
    return ConfigDict(_definition("mixers", {"kind": kind, **settings}, f"mixer({kind!r})"))


def mlp(kind: str, **settings: Any) -> ConfigDict:
    """A definition for ``config.mlps``, likewise."""
    return ConfigDict(_definition("mlps", {"kind": kind, **settings}, f"mlp({kind!r})"))


def data(kind: str, **settings: Any) -> ConfigDict:
    """A definition for ``config.data``, likewise.

    Kind "mixture" takes ``components``: name -> a definition, with a ``weight`` beside its settings (1.0).
    """
    given = ConfigDict({"kind": kind, **settings}).to_dict()
    return ConfigDict(_definition("data", given, f"data({kind!r})"))


# Reading files and overrides.


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """The config of ``spec``, "file.py", "file.py:argument" or a run's "config.json", with overrides applied.

    overrides: dotted field -> text as on a command line. ``mixers.<name>.kind``, ``mlps.<name>.kind`` and
        ``data.kind`` come first and put that kind's defaults in place; a name that the file does not have is
        thereby defined.
    Runs the file: a config is Python and can do whatever Python can (a config.json cannot).
    """
    filename, _, argument = spec.partition(":")
    path = Path(filename)
    if not path.is_file():
        known = [str(file) for file in path.parent.glob("*.py") if file.stem != "__init__"]
        raise ConfigError("--config", filename, "no such file", nearest(filename, known) if known else "")
    values = (from_json(path) if path.suffix == ".json" else _run(path, argument)).to_dict()
    for field, text in sorted((overrides or {}).items(), key=lambda item: not item[0].endswith(".kind")):
        _override(values, field, text)
    return ConfigDict(values)


def _run(path: Path, argument: str) -> ConfigDict:
    spec = f"{path}:{argument}" if argument else str(path)
    try:
        module: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
        exec(compile(path.read_bytes(), path, "exec"), module)
        get_config = module.get("get_config")
        if get_config is None:
            fix = "A sweep runs with python -m launch.sweep." if "get_sweep" in module else ""
            raise ConfigError("--config", spec, "the file defines no function get_config", fix)
        if argument and not inspect.signature(get_config).parameters:
            raise ConfigError(
                "--config", spec, "this file's get_config takes no argument", f"Use {str(path)!r}."
            )
        config = get_config(argument) if argument else get_config()
    except ConfigError:
        raise
    except Exception as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
        ]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        problem = f"failed at line {line} with {type(error).__name__} ({error})"
        raise ConfigError("--config", spec, problem) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError("--config", spec, f"get_config returned {type(config).__name__}, not a ConfigDict")
    return config


def _override(config: dict[str, Any], field: str, text: str) -> None:
    if field == "init_from":
        config[field] = text
        return
    section = field.split(".")[0]
    if section not in SECTIONS:
        raise ConfigError(field, text, f"there is no section {section!r}", nearest(section, SECTIONS))
    *path, name = field.split(".")
    prefix = ".".join(path)
    form = {name: f"{name}.<name>.<setting>" for name in KINDS}
    form["data"] = "data.<field> or data.components.<name>.<field>"
    depths = {**dict.fromkeys(KINDS, (2,)), "data": (1, 3)}.get(section, (1,))
    if len(path) not in depths or (len(path) == 3 and path[1] != "components"):
        raise ConfigError(field, text, f"fields here are {form.get(section, section + '.<field>')}")
    owner = config
    for key in path[:-1]:
        owner = owner.setdefault(key, {})
    if name == "kind" and section not in schema.SECTIONS:
        weight = (
            {"weight": owner[path[-1]].get("weight", 1.0)} if len(path) == 3 and path[-1] in owner else {}
        )
        owner[path[-1]] = _definition(section, {"kind": text}, prefix) | weight
        return
    if section not in schema.SECTIONS and path[-1] not in owner:
        raise ConfigError(field, text, f"there is no {prefix}", nearest(path[-1], owner))
    target = owner.setdefault(path[-1], {})
    known = dict(schema.fields(_class(section, target, prefix)))
    if len(path) == 3:
        known["weight"] = schema.NonNegative
    if name not in known:
        raise ConfigError(field, text, "no such field", nearest(name, known))
    try:
        target[name] = schema.parse(known[name], text)
    except ValueError as error:
        raise ConfigError(field, text, str(error)) from None


# Checking.


def resolve(config: ConfigDict | FrozenConfigDict) -> FrozenConfigDict:
    """The complete, checked config, frozen: what `model.build`, `data.build` and `trainer.train` take.

    Fills in defaults of fields that are missing, the number of layers and the MLP width; leaves out mixers
    and MLPs that the pattern does not use. Resolving twice changes nothing. Raises ConfigError.
    """
    given = config.to_dict()
    init_from = _convert("init_from", str, given.pop("init_from", ""))
    for name, values in given.items():
        if name not in SECTIONS:
            raise ConfigError(name, values, "there is no such section", nearest(name, SECTIONS))
        _must_be_mapping(values, name)
    resolved: dict[str, Any] = {}
    for name in schema.SECTIONS:
        section = _build(name, given.get(name, {}), name)
        if hasattr(section, "check"):
            with _under(name):
                section.check()
        resolved[name] = dataclasses.asdict(section)
    check_batch(resolved["train"], {axis: max(1, size) for axis, size in resolved["mesh"].items()})

    model, definitions = resolved["model"], {section: given.get(section, {}) for section in KINDS}
    layers = pattern.fill(pattern.parse(model["pattern"], *definitions.values()), model["num_layers"])
    names = {section: {pattern.split(layer)[i] for layer in layers} for i, section in enumerate(KINDS)}
    model["num_layers"] = len(layers)
    model["mlp_hidden"] = model["mlp_hidden"] or mlp_hidden(model["d_model"])
    for name in model["post_norm"]:
        if name not in definitions["mixers"]:
            problem = f"no mixer named {name!r} in mixers"
            raise ConfigError(
                "model.post_norm", model["post_norm"], problem, nearest(name, definitions["mixers"])
            )
    for section, given_definitions in definitions.items():
        checked = {
            name: _definition(section, given_definitions[name], f"{section}.{name}")
            for name in sorted(given_definitions)
        }
        resolved[section] = {name: checked[name] for name in checked if name in names[section]}
        for name, definition in resolved[section].items():
            with _under(f"{section}.{name}"):
                _build(section, definition, "").check(model["d_model"])
    resolved["data"] = _definition("data", given.get("data", {"kind": "text"}), "data")
    with _under("data"):
        data_kinds.settings(resolved["data"])
    resolved["init_from"] = init_from
    return FrozenConfigDict(resolved)


def mlp_hidden(d_model: int) -> int:
    """SwiGLU width for an MLP of 8 d_model^2 parameters: 8/3 d_model, rounded up (FLA's hidden_ratio 4)."""
    return -(-(8 * d_model // 3) // MLP_MULTIPLE) * MLP_MULTIPLE


def check_batch(train: Mapping[str, Any], mesh: Mapping[str, int]) -> None:
    """A microbatch must split evenly over the mesh axes data and fsdp. mesh: axis -> size, without -1."""
    microbatches, parts = train["microbatches"], mesh["data"] * mesh["fsdp"]
    if train["batch_size"] // microbatches % parts:
        raise ConfigError(
            "train.batch_size",
            train["batch_size"],
            "must be a multiple of train.microbatches * mesh.data * mesh.fsdp = "
            f"{microbatches} * {mesh['data']} * {mesh['fsdp']}",
        )


def _definition(
    section: str, values: Mapping[str, Any], prefix: str, beside: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A mixer's, an MLP's or the data's definition, complete: its kind and every setting.

    beside: fields that may stand beside these, for error messages.
    """
    _must_be_mapping(values, prefix)
    if section in KINDS or values.get("kind") != MIXTURE:
        settings = _build(section, values, prefix, beside)
        return {"kind": values["kind"], **dataclasses.asdict(settings)}
    with _under(prefix):
        for name in values:
            if name not in ("kind", "components"):
                raise ConfigError(name, values[name], "no such field", "A mixture has components.")
    components = {}
    for name, component in values.get("components", {}).items():
        where = f"{prefix}.components.{name}"
        _must_be_mapping(component, where)
        with _under(where):
            weight = _convert("weight", schema.NonNegative, component.get("weight", 1.0))
        rest = {key: value for key, value in component.items() if key != "weight"}
        components[name] = {**_definition("data", rest, where, ("weight",)), "weight": weight}
    return {"kind": MIXTURE, "components": components}


def _build(section: str, values: Mapping[str, Any], prefix: str, beside: tuple[str, ...] = ()) -> Any:
    """The dataclass instance of one section or definition: fields known, types right, defaults added."""
    described = _class(section, values, prefix)
    known = schema.fields(described)
    settings = dict(values)
    if section not in schema.SECTIONS:
        del settings["kind"]
    with _under(prefix):
        for name, value in settings.items():
            if name not in known:
                raise ConfigError(name, value, "no such field", nearest(name, [*known, *beside]))
            settings[name] = _convert(name, known[name], value)
    return described(**settings)


def _convert(name: str, kind: Any, value: Any) -> Any:
    try:
        return schema.convert(kind, value)
    except ValueError as error:
        raise ConfigError(name, value, str(error)) from None


def _class(section: str, values: Mapping[str, Any], prefix: str) -> Any:
    """The dataclass that describes ``values``; those of definitions depend on their kind."""
    if section in schema.SECTIONS:
        return schema.SECTIONS[section]
    kind = str(values.get("kind"))
    with _under(prefix):
        if section in KINDS:
            return KINDS[section].load(kind).Config
        if kind not in data_kinds.KINDS:
            kinds = [*data_kinds.KINDS, MIXTURE]
            raise ConfigError("kind", kind, "must be one of " + ", ".join(kinds), nearest(kind, kinds))
        return data_kinds.KINDS[kind].Config


def _must_be_mapping(values: Any, prefix: str) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(prefix, values, "must be a section with fields, not a value")


@contextlib.contextmanager
def _under(prefix: str) -> Iterator[None]:
    """Errors raised inside get their full dotted field."""
    try:
        yield
    except ConfigError as error:
        raise error.under(prefix) from None


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """A resolved config's dict that an older version wrote, with the defaults of fields that are new.

    As it is if this version cannot resolve it any more.
    """
    try:
        return resolve(ConfigDict(values)).to_dict()
    except ConfigError:
        return values


# config.json


def portable(config: ConfigDict | FrozenConfigDict) -> dict[str, Any]:
    """The config as it is written down: paths without home directory and user name."""
    return private.in_paths(config.to_dict(), private.hide)


def to_json(config: ConfigDict | FrozenConfigDict) -> str:
    return json.dumps(portable(config), indent=2) + "\n"


def from_json(path: str | Path) -> ConfigDict:
    """What `to_json` wrote; pass it through `resolve`. ConfigError for a file that is not a config."""
    try:
        return ConfigDict(private.in_paths(json.loads(Path(path).read_text()), private.reveal))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError("--config", str(path), f"is not a readable config.json ({error})") from error


def of_run(workdir: str | Path) -> FrozenConfigDict:
    """The config, resolved, of the run in ``workdir``; ConfigError where there is none."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        fix = "Name a directory that train.py wrote."
        raise ConfigError("--workdir", str(workdir), "holds no config.json", fix)
    return resolve(from_json(path))
