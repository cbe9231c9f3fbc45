"""What others wrote, and what others will read: one way in and one way out for small files, names, texts.

In: `read_bytes` and `read_json` (size, depth and shape are checked before the value is used) and `inside`,
which joins a name that a file gave to a folder and never leaves it. Out: `write_text`, `write_bytes` and
`write_json` (beside the file, synced, renamed over it), `shell`, and `terminal`, `markup` and `plot` for
showing text that may hold anything.
"""

import contextlib
import json
import os
import re
import shlex
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import rich.markup

from hybridlm.errors import ConfigError

MAX_BYTES = 1 << 28  # of a file that is read whole; the largest public tokenizer.json has 40 MB
MAX_DEPTH = 100  # brackets within brackets; Python's own limit differs by version and by who calls
NATURAL = "natural"  # a shape: a whole number from 0 up that an int64 holds
ANY = object  # a shape: whatever JSON can say
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", NATURAL: "a count",
          dict: "an object", list: "a list", type(None): "null"}  # fmt: skip
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_LONE = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON spells half a surrogate pair (and the whole ones)


# In.


def regular(path: str | Path, what: str) -> os.stat_result:
    """The state of a regular file; ConfigError for anything else: a pipe could be waited for without end."""
    try:
        state = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(what, str(path), "cannot be read", f"{reason}.") from error
    if not stat.S_ISREG(state.st_mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(state.st_mode), "a device")
        fix = "Name a file in it." if kind == "a directory" else "Give a file that can be read twice."
        raise ConfigError(what, str(path), f"is {kind}, not a file", fix)
    return state


def read_bytes(path: str | Path, what: str, limit: int = MAX_BYTES) -> bytes:
    """A regular file of at most ``limit`` bytes, whole. what: the field or flag that ConfigError names."""
    if (size := regular(path, what).st_size) > limit:
        raise ConfigError(what, str(path), f"has {size:,} bytes, more than the {limit:,} that are read")
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ConfigError(what, str(path), "cannot be read", f"{error.strerror}.") from error
    if len(content) > limit:
        raise ConfigError(what, str(path), f"has more than the {limit:,} bytes that are read")
    return content


def read_json(path: str | Path, what: str, shape: Any = ANY) -> Any:
    """The value of the JSON file ``path``, of ``shape`` (see `check_shape`).

    what: the field or flag that the ConfigError names, with the file as its value. Refused besides what is no
    JSON: nesting beyond MAX_DEPTH, an object that gives a name twice, text that has no UTF-8.
    """
    content = read_bytes(path, what)
    try:
        value = parse(content)
        check_shape(value, shape)
    except ValueError as error:
        said = terminal(str(error))
        raise ConfigError(what, str(path), f"is not the JSON that it should be: {said}") from error
    return value


def parse(content: bytes | str) -> Any:
    """The value that JSON ``content`` (UTF-8) spells; ValueError for all that `read_json` refuses."""
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    check_depth(text)
    value = json.loads(text, object_pairs_hook=_named_once)
    if _LONE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it holds half a surrogate pair, which is no character") from error
    return value


def check_depth(text: str) -> None:
    """ValueError for JSON nested beyond MAX_DEPTH; reads the text itself, so that no parser has to."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _BRACKETS.finditer(text):
        token = match[0]
        if token in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        elif token in "]}":
            depth -= 1


def check_shape(value: Any, shape: Any, where: str = "") -> None:
    """ValueError, naming the place, if ``value`` is not of ``shape``.

    A shape is a type (bool is no int, an int is a float); NATURAL; ANY; a tuple of shapes, of which one must
    fit; [shape] for a list of such; {str: shape} for an object with any names; or {name: shape, ...} for one
    that has these names (those ending in "?" may be missing) and perhaps others.
    """
    if shape is ANY:
        return
    if isinstance(shape, tuple):
        for one in shape:
            with contextlib.suppress(ValueError):
                check_shape(value, one, where)
                return
        raise ValueError(f"{where or 'it'} must be {' or '.join(map(_word, shape))}, not {_word(value)}")
    kind = type(shape) if isinstance(shape, list | dict) else shape
    if not _is(value, kind):
        raise ValueError(f"{where or 'it'} must be {_word(kind)}, not {_word(value)}")
    if isinstance(shape, list):
        for index, one in enumerate(value):
            check_shape(one, shape[0], f"{where}[{index}]")
    elif isinstance(shape, dict) and str in shape:
        for name, one in value.items():
            check_shape(one, shape[str], f"{where}.{name}".lstrip("."))
    elif isinstance(shape, dict):
        for name, one in shape.items():
            plain = name.removesuffix("?")
            place = f"{where}.{plain}".lstrip(".")
            if plain in value:
                check_shape(value[plain], one, place)
            elif plain == name:
                raise ValueError(f"{place} is missing")


def digits(text: str) -> bool:
    """Whether ``text`` is a whole number in ASCII: ``str.isdigit`` takes superscripts too, and `int` not."""
    return text.isascii() and text.isdigit()


def numbered(folder: Path) -> list[Path]:
    """What lies in ``folder`` under whole numbers, by number."""
    return sorted((one for one in folder.glob("[0-9]*") if digits(one.name)), key=lambda one: int(one.name))


def inside(folder: str | Path, name: Any, what: str, links: bool = False) -> Path:
    """``folder/name`` for a ``name`` that was read from a file; ConfigError if that would lie elsewhere.

    links: whether the file may be a symlink to a place outside. Without it only those of a Hugging Face cache
        may, whose snapshots consist of links to the blobs beside them.
    """
    path = PurePosixPath(name) if isinstance(name, str) else None
    if (
        path is None or not path.parts or path.is_absolute() or ".." in path.parts
        or any(unicodedata.category(character).startswith("C") for character in name) or "\\" in name
    ):  # fmt: skip
        raise ConfigError(what, str(folder), f"names a file {name!r}, which must lie inside this folder")
    joined = Path(folder, name)
    if links:
        return joined
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(joined))
    blobs = [root.parent.parent / "blobs"] if root.parent.name == "snapshots" else []
    if not any(target.is_relative_to(allowed) for allowed in [root, *blobs]):
        problem = "is a link to a place outside its folder"
        raise ConfigError(what, str(joined), problem, "Copy the file there.")
    return joined


# Out.


def write_bytes(path: str | Path, content: bytes) -> None:
    """Puts ``content`` at ``path`` whole or not at all: written beside it, synced, and renamed over it.

    A link at ``path`` is replaced, not followed. Raises OSError, and leaves what was there.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` in UTF-8; names of files that are none are kept as Python reads them back."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: str | Path, value: Any) -> None:
    """`write_text` of ``value``, indented; ValueError for a number that is not finite: JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` last through a loss of power, where the file system can."""
    with contextlib.suppress(OSError):  # some network file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def shell(words: Iterable[str | Path]) -> str:
    """A command's words as bash reads them back unchanged, on one line: job files are read by lines too.

    ValueError for a NUL.
    """
    texts = list(map(str, words))
    if any("\0" in text for text in texts):
        raise ValueError("a shell's word cannot hold a NUL")
    escape = lambda c: "".join(f"\\x{byte:02x}" for byte in c.encode("utf-8", "surrogateescape"))
    spelt = lambda text: "".join(c if c.isprintable() and c not in "\\'" else escape(c) for c in text)
    return " ".join(shlex.quote(text) if text.isprintable() else f"$'{spelt(text)}'" for text in texts)


def terminal(text: str, lines: bool = False) -> str:
    """``text`` without what moves a cursor, colours, or turns the direction: such characters are spelt out.

    lines: keeps line breaks and tabs.
    """
    kept = "\n\t" if lines else ""
    spelt = lambda character: character.encode("unicode_escape").decode()
    hidden = lambda character: unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(spelt(c) if c not in kept and hidden(c) else c for c in text)


def markup(text: str) -> str:
    """`terminal` for a place where Rich reads ``[...]`` as markup."""
    return rich.markup.escape(terminal(text))


def plot(text: str) -> str:
    """`terminal` for a label of matplotlib, which reads ``$...$`` as mathematics."""
    return terminal(text).replace("$", r"\$")


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it gives the name {next(n for n in names if names.count(n) > 1)!r} twice")
    return value


def _is(value: Any, kind: Any) -> bool:
    if kind == NATURAL:
        return type(value) is int and 0 <= value < 1 << 63
    return type(value) in ((int, float) if kind is float else (kind,))


def _word(kind: Any) -> str:
    """What a shape asks for, or what a value is."""
    if isinstance(kind, type) or kind == NATURAL:
        return _WORDS.get(kind) or kind.__name__
    if isinstance(kind, str | int | float) and len(repr(kind)) < 40:
        return repr(kind)
    return _WORDS.get(type(kind), type(kind).__name__)
