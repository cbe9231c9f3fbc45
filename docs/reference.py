"""The page of every config field, made from `hybridlm.schema` and the kinds: `page()` is its Markdown.

A field's meaning is in the docstring of its class or of one above it, as "field: meaning.", several on a line
apart by two spaces, several of one meaning apart by commas.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from hybridlm import config, data, fields, kinds, mixers, mlps, objectives, schema

ROOMS = {"mixers.<name>": mixers, "mlps.<name>": mlps, "data": data, "objective": objectives}
NOUNS = {"mixers.<name>": "Mixer", "mlps.<name>": "MLP", "data": "Data", "objective": "Objective"}
UNSAID = (fields.INT32, 1e9)  # highest values that nobody will meet
INTRODUCTION = """# Every field of a config

`--config.<section>.<field>=<value>` sets one on a command line, `config.<section>.<field> = value` in a file;
`python train.py --config=FILE --dry_run` prints the whole config. This page is made from the code when the
site is built. Where no highest value is given, it is 2^31 - 1 for a whole number and 1e9 for another.

`init_from` stands alone: a run's workdir or a Hugging Face folder to take the first parameters from.
"""
HEADINGS = {
    "mixers.<name>": "A definition of `mixers` has a `kind`, one of those below or `module:Class` "
    "([outside](outside.md)), and its settings. Every config has these: {standard}.",
    "mlps.<name>": "A definition of `mlps`, likewise.",
    "data": "`data.kind` chooses what the others are. A mixture's `components` are definitions by name.",
    "objective": "`objective.kind` chooses the loss.",
}


class Field(NamedTuple):
    name: str
    accepts: str
    default: str
    meaning: str


def described() -> Iterator[tuple[str, str, type]]:
    """(prefix of the fields, kind or "", class that holds them), in the order of the page."""
    for name, section in schema.SECTIONS.items():
        yield name, "", section
    for prefix, room in ROOMS.items():
        for kind in data.KINDS if room is data else kinds.names(room):
            yield prefix, kind, room.config_class(kind)


def rows(section: Any) -> list[Field]:
    """The fields of a class of settings; `kind`, which chooses the class, is not one of them."""
    defaults = {field.name: field for field in dataclasses.fields(section)}
    said = meanings(section)
    return [
        Field(name, accepts(annotation), _default(defaults[name]), said.get(name, ""))
        for name, annotation in fields.fields(section).items()
        if name != "kind"
    ]


def meanings(section: Any) -> dict[str, str]:
    """Field -> what the docstrings say of it, the nearest class first."""
    found: dict[str, str] = {}
    known = "|".join(field.name for field in dataclasses.fields(section))
    entry = re.compile(rf"(?:^|(?<=\s\s)|(?<=[;.] ))((?:{known})(?:, (?:{known}))*): ", re.MULTILINE)
    for owner in section.__mro__:
        text = inspect.cleandoc(owner.__dict__.get("__doc__") or "")
        text = re.sub(r"\n +", "\n", text)
        starts = list(entry.finditer(text))
        for start, end in zip(starts, [*(one.start() for one in starts[1:]), len(text)], strict=False):
            meaning = " ".join(text[start.end() : end].partition("\n\n")[0].split()).rstrip(";")
            for name in start[1].split(", "):
                found.setdefault(name, meaning)
    return found


def accepts(annotation: Any) -> str:
    """The type in words, and its limits: "a whole number, at least 1"."""
    if get_origin(annotation) is fields.Named:
        return "definitions by name"
    words = fields.describe(annotation)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is Annotated:
        for limits in annotation.__metadata__:
            if limits.low != float("-inf"):
                words += f", {'above' if limits.above else 'at least'} {fields.number(limits.low)}"
            if limits.high not in (*UNSAID, float("inf")):
                words += f", at most {fields.number(limits.high)}"
    return words


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return ""  # a mixture's components have none
    return f"`{field.default!r}`" if isinstance(field.default, str | tuple) else f"`{field.default}`"


def page() -> str:
    """The whole page; a table for each section and kind."""
    standard = ", ".join(f"`{name}`" for name in config.STANDARD)
    lines, last = [INTRODUCTION], ""
    for prefix, kind, section in described():
        if prefix != last:
            lines.append(f"## `{prefix}`\n")
            lines += [HEADINGS[prefix].format(standard=standard) + "\n"] if prefix in HEADINGS else []
        last = prefix
        if kind:
            lines.append(f"### {NOUNS[prefix]} `{kind}`\n")
            lines.append(_opening(section))
        if found := rows(section):
            lines.append("| field | accepts | default | |\n|---|---|---|---|")
            lines += ["| " + " | ".join(_cell(one) for one in _marked(row)) + " |" for row in found]
            lines.append("")
    return "\n".join(lines)


def _opening(section: Any) -> str:
    """The first paragraph of the kind's module: what it is."""
    module = inspect.getmodule(section)
    return inspect.cleandoc((module and module.__doc__) or "").partition("\n\n")[0] + "\n"


def _marked(row: Field) -> Field:
    return row._replace(name=f"`{row.name}`", meaning=row.meaning.replace("``", "`"))


def _cell(text: str) -> str:
    """``text`` in a cell; an asterisk or underscore of a formula is no emphasis."""
    parts = re.split("(`[^`]*`)", text.replace("|", "\\|"))
    return "".join(part if part[:1] == "`" else re.sub(r"([*_<])", r"\\\1", part) for part in parts)


if __name__ == "__main__":
    print(page())
