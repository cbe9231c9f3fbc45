"""What users see of a run that did not finish: ConfigError for bad input, RunError for a run that cannot go
on, Stopped for one that was asked to leave and can be resumed."""

import difflib
from collections.abc import Collection, Iterable


class ConfigError(ValueError):
    """A setting that cannot be honoured, found before anything is compiled or written.

    field: dotted name as the user would type it (``mixers.kda.num_heads``), or a flag (``--config``).
    value: what was given.  allowed: what would be accepted.  fix: what to do, one sentence.
    """

    def __init__(self, field: str, value: object, allowed: str, fix: str = ""):
        self.field, self.value, self.allowed, self.fix = field, value, allowed, fix
        super().__init__(f"{field} = {value!r}: {allowed}." + (f" {fix}" if fix else ""))

    def under(self, prefix: str) -> "ConfigError":
        """The same error with its field moved below ``prefix`` (a mixer does not know its own name)."""
        return ConfigError(f"{prefix}.{self.field}", self.value, self.allowed, self.fix)


class RunError(RuntimeError):
    """A run that cannot go on (full disk, loss not finite ...): the message says why, and what is intact."""


class Stopped(Exception):
    """A run that was asked to stop and did so with a complete checkpoint: the message says at which step."""


def first_line(error: BaseException) -> str:
    """Of what it says; its type's name where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_of(field: str, value: str, names: Collection[str]) -> None:
    """ConfigError unless ``value`` is among ``names``."""
    if value not in names:
        raise ConfigError(field, value, "must be one of " + ", ".join(names), nearest(value, names))


def nearest(name: str, names: Iterable[str]) -> str:
    """'Did you mean ...?' for a misspelt name, or the whole list when nothing is close."""
    names = sorted(names)
    if not names:
        return "There is none yet."
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else "Known: " + ", ".join(names) + "."
