"""What a dataclass field accepts: its annotation and limits, held against Python values and against text.

The one idiom of validation: a limit of one field is part of its type (`Annotated[int, Limits(1)]`), a limit
between fields stands in the class's ``check``. `build` makes an instance of what a user gave. (Pydantic and
msgspec were looked at: both would still need our words for what is allowed, and the reading of text.)
"""

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, get_args, get_origin

from hybridlm.errors import ConfigError, nearest

WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", type(None): "None"}
T = TypeVar("T")
Read = Callable[[Any, Any], Any]  # `convert` or `parse`


class Limits(NamedTuple):
    """low to high, both included; ``above``: low itself is not."""

    low: float = float("-inf")
    high: float = float("inf")
    above: bool = False

    def problem(self, value: float) -> str:
        """What is wrong with ``value``, "" if nothing."""
        low = value < self.low or (self.above and value == self.low)
        if not low and value <= self.high:
            return ""
        if self.high < 1000 and not self.above:
            return f"must be between {self.low:g} and {self.high:g}"
        if low:
            return f"must be {'above' if self.above else 'at least'} {self.low:g}"
        return f"must be at most {number(self.high)}"


INT32 = 2**31 - 1  # sizes and steps beyond it overflow indices somewhere
Positive = Annotated[int, Limits(1, INT32)]
Count = Annotated[int, Limits(0, INT32)]
NonNegative = Annotated[float, Limits(0, 1e9)]
Above = Annotated[float, Limits(0, 1e9, above=True)]
Fraction = Annotated[float, Limits(0, 1)]
Epsilon = Annotated[float, Limits(0, 1)]  # of a norm
Theta = Annotated[float, Limits(0, 1e15)]  # base of rotary frequencies


class Named(dict[str, T], Generic[T]):
    """Definitions by name, in order: a dict that nobody changes, so that it has a hash."""

    def __hash__(self) -> int:  # type: ignore[override]  # of a dict it is None
        return hash(tuple(self.items()))

    def __setitem__(self, name: str, value: T) -> None:
        raise TypeError("a resolved config does not change: dataclasses.replace makes another")


def plain(section: Any) -> dict[str, Any]:
    """Nested dicts of what an instance of a described class holds, from which `build` makes it again."""
    return _plain(dataclasses.asdict(section))


def _plain(value: Any) -> Any:
    return {name: _plain(one) for name, one in value.items()} if isinstance(value, dict) else value


@functools.cache
def fields(section: Any) -> dict[str, Any]:
    """Name and annotation of every field of a dataclass."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


@contextmanager
def under(prefix: str) -> Iterator[None]:
    """Errors raised inside get their full dotted field; ``prefix`` "" changes nothing."""
    try:
        yield
    except ConfigError as error:
        raise (error.under(prefix) if prefix else error) from None


def build(section: type[T], values: Any, prefix: str = "") -> T:
    """The instance of a dataclass that ``values``, a mapping of some of its fields, describe.

    ConfigError below ``prefix`` for a field that is not there and a value that does not fit.
    """
    mapping(values, prefix)
    described: Any = section
    known, given = fields(described), dict(values)
    with under(prefix):
        for name, value in given.items():
            if name not in known:
                raise ConfigError(name, value, "no such field", nearest(name, known))
            given[name] = checked(name, known[name], value)
    return section(**given)


def mapping(values: Any, prefix: str) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(prefix, values, "must be a section with fields, not a value")


def describe(kind: Any) -> str:
    """What a field of annotation ``kind`` accepts, in words; TypeError for one that no config can give."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return describe(args[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(describe, args))
    if origin is tuple and args[1:] == (...,):
        return f"a tuple of {describe(args[0])} each"
    if kind not in WORDS:
        raise TypeError(f"a field cannot be a {getattr(kind, '__name__', kind)}")
    return WORDS[kind]


def convert(kind: Any, value: Any) -> Any:
    """``value`` as annotation ``kind`` wants it; ValueError when it does not fit.

    Exact but for what Python itself treats as the same: an int serves as a float, a list as a tuple.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = convert(args[0], value)
        for limits in args[1:]:
            if problem := limits.problem(value):
                raise ValueError(problem)
        return value
    if origin is Literal and value in args and type(value) is type(args[args.index(value)]):
        return value
    if origin in (types.UnionType, typing.Union):
        return _alternative(convert, kind, value)
    if origin is tuple and isinstance(value, tuple | list):
        return tuple(convert(args[0], element) for element in value)
    if kind is float and type(value) in (int, float) and abs(value) <= 1e300 and math.isfinite(value):
        return float(value)
    if kind is not float and type(value) is kind:
        if kind is str and not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise ValueError("must be text in UTF-8")  # it could not be written down
        return value
    raise ValueError(f"must be {describe(kind)}")


def parse(kind: Any, text: str) -> Any:
    """The value of annotation ``kind`` that ``text`` on a command line means; ValueError if it means none.

    Numbers are written in ASCII digits without underscores.
    """
    return convert(kind, _meant(kind, text))


def checked(name: str, kind: Any, value: Any, read: Read = convert) -> Any:
    """``read`` (`parse` for text) with a ConfigError for the field ``name``."""
    try:
        return read(kind, value)
    except ValueError as error:
        raise ConfigError(name, value, str(error)) from None


def _meant(kind: Any, text: str) -> Any:
    """What ``text`` spells where ``kind`` is wanted, limits aside; itself if nothing."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _meant(args[0], text)
    if origin is Literal:
        return next((arg for arg in args if str(arg) == text), text)
    if origin in (types.UnionType, typing.Union):
        return _alternative(parse, kind, text)
    if origin is tuple:
        around = re.fullmatch(r"\s*(?:\([^()]*\)|\[[^\[\]]*\])\s*", text)  # a pattern may end in brackets
        text = text.strip()[1:-1] if around else text
        parts = [part.strip() for part in text.split(",")]
        return tuple(_meant(args[0], part.strip("'\"")) for part in parts if part)
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind is type(None):
        return None if text.lower() == "none" else text
    if kind is int and re.fullmatch(r"\s*[+-]?[0-9]{1,40}\s*", text):
        return int(text)
    if kind is float and text.isascii() and "_" not in text:
        with suppress(ValueError):
            return float(text)
    return text


def _alternative(read: Read, union: Any, value: Any) -> Any:
    """What the first of the union's kinds that takes ``value`` makes of it."""
    for kind in get_args(union):
        with suppress(ValueError):
            return read(kind, value)
    raise ValueError(f"must be {describe(union)}")


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
