"""Showing never ends a run: output that outlasts its reader, its disk and its encoding."""

import contextlib
import os
import sys
from typing import Any

import rich
from rich.console import Console

from hybridlm import untrusted


class Steady:
    """A text stream whose writes and flushes lose what cannot be shown, and raise nothing."""

    def __init__(self, stream: Any):
        self.stream = stream
        with contextlib.suppress(Exception):  # an encoding without the character spells it out
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, UnicodeError):  # closed, full, or gone
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def line(text: str, console: Console | None = None) -> None:
    """``text`` without what steers a terminal: no colours, no markup, broken where the reader likes."""
    text = untrusted.terminal(text, lines=True)  # a model, say, can write any character
    (console or rich.get_console()).print(text, markup=False, highlight=False, soft_wrap=True)


def steady() -> None:
    """Makes sys.stdout and sys.stderr `Steady`, once; rich and the log look them up at every line."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 (None: it was closed)
        if not isinstance(stream, Steady):
            setattr(sys, name, Steady(stream))
