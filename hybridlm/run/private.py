"""What a run writes must not tell who ran it: the home directory becomes ``~``, the user's name ``$USER``."""

import getpass
import logging
import os
import re
from typing import Any

from hybridlm import untrusted

SHARED_NAMES = ("root", "user", "ubuntu")  # of nobody in particular


def hide(text: str) -> str:
    """``text`` without the home directory and without the user's name as part of a path."""
    home = os.path.expanduser("~").rstrip("/")
    if home:
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    if (user := _user()) and user not in SHARED_NAMES:
        text = re.sub(rf"(?<=/){re.escape(user)}(?![\w.-])", "$USER", text)
    return text


def shown(text: str, lines: bool = False) -> str:
    """`hide`, and nothing that steers a terminal. lines: as of `untrusted.terminal`."""
    return untrusted.terminal(hide(text), lines)


def reveal(text: str) -> str:
    """The inverse, for comma-separated paths, on a machine that may have another home."""
    text = re.sub(r"(^|,\s*)~(?=/|,|$)", lambda match: match[1] + os.path.expanduser("~"), text)
    return re.sub(r"(?<=/)\$USER(?![\w.-])", _user(), text)


def log_filter(record: logging.LogRecord) -> bool:
    """`hide` for every line of a log, and nothing in it that steers a terminal. It cannot fail."""
    try:
        text = record.getMessage()
    except Exception as error:
        text = f"{record.msg} (cannot be filled in: {error})"
    record.msg, record.args = shown(text, lines=True), ()
    return True


def plain_log() -> None:
    """Has the log written to stderr, a line each, through `log_filter`."""
    logging.basicConfig(format="%(message)s", force=True)
    for handler in logging.getLogger().handlers:
        handler.addFilter(log_filter)
    logging.getLogger("hybridlm").setLevel(logging.INFO)


def in_paths(values: dict[str, Any], change: Any) -> dict[str, Any]:
    """A config's dict with ``change`` made to every string that can be a path, a teacher's too."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: changed(one) for name, one in value.items()}
        return change(value) if isinstance(value, str) else value

    places = ("data", "val", "objective", "stages", "init_from")
    return values | {name: changed(values[name]) for name in places if name in values}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return ""
