"""Kinds by name: a module of a room of this package, or "module:Class" of code that lives anywhere else."""

import dataclasses
import importlib
import pkgutil
import re
import traceback
from types import ModuleType
from typing import Any

from hybridlm.errors import ConfigError, nearest
from hybridlm.fields import describe, fields

# Files whose part in an import is none of the user's.
INSIDE = re.compile(rf"importlib|{re.escape(__file__)}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the ``Config`` of every kind starts from. kind: its name, as a config gives it."""

    kind: str = dataclasses.field(default="", kw_only=True)


def names(room: ModuleType) -> list[str]:
    """The kinds that ``room``, a package, has a file for."""
    return sorted(module.name for module in pkgutil.iter_modules(room.__path__))


def load(room: ModuleType, kind: str, member: str) -> Any:
    """The class of ``kind``: ``member`` of its module in ``room``, or what "module:Class" names.

    ConfigError for a kind that has no file, and for code that cannot be imported, names no settings or leaves
    a method undefined that every kind has (those with `abc.abstractmethod`).
    """
    if ":" in kind:
        return _outside(kind)
    if kind not in (known := names(room)):
        problem = f"must be one of {', '.join(known)}, or module:Class"
        raise ConfigError("kind", kind, problem, nearest(kind, known))
    return getattr(importlib.import_module(f"{room.__name__}.{kind}"), member)


def _outside(kind: str) -> Any:
    module, _, name = kind.partition(":")
    if not all(part.isidentifier() for part in module.split(".")) or not name.isidentifier():
        raise ConfigError("kind", kind, "must be module:Class, dotted names of Python")
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # anything can go wrong in code that is not ours
        problem = f"cannot be imported ({type(error).__name__}: {error})"
        fix = "Install it, or put its folder into PYTHONPATH."
        own = [f for f in traceback.extract_tb(error.__traceback__) if not INSIDE.search(f.filename)]
        fix = f"It fails at line {own[-1].lineno} of {own[-1].filename}." if own else fix
        raise ConfigError("kind", kind, problem, fix) from error
    found = getattr(imported, name, None)
    if found is None:
        classes = [one for one, what in vars(imported).items() if isinstance(what, type)]
        raise ConfigError("kind", kind, f"the module has no {name}", nearest(name, classes))
    config = getattr(found, "config_class", None)
    if not (isinstance(config, type) and issubclass(config, Settings)):
        fix = "Name its settings in the class: config_class, a frozen dataclass below hybridlm.mixers.Config."
        raise ConfigError("kind", kind, "names no settings", fix)
    try:
        for annotation in fields(config).values():  # type: ignore[arg-type]  # as `fields` says
            describe(annotation)
        hash(config(kind=kind))
    except Exception as error:
        fix = "Each is a number, a text, True or False, or a tuple of one of these, and has a default."
        problem = f"has settings that no config can give ({type(error).__name__}: {error})"
        raise ConfigError("kind", kind, problem, fix) from error
    methods = [(name, getattr(owner, name, None)) for owner in (found, config) for name in dir(owner)]
    if lacking := [name for name, one in methods if getattr(one, "__isabstractmethod__", False)]:
        fix = "docs/outside.md says what a kind is asked for."
        raise ConfigError("kind", kind, f"does not define {', '.join(lacking)}", fix)
    return found
