"""Text to hide needles in: a file that the user names, or the language reference that comes with Python."""

import functools
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from hybridlm import untrusted
from hybridlm.errors import ConfigError
from hybridlm.run import private

DEFAULT = "python-docs:"


class Haystack(NamedTuple):
    """name: of its source.  words: in order.  fingerprint: a hash of them."""

    name: str
    words: tuple[str, ...]
    fingerprint: str

    def text(self, words: int) -> str:
        """The first ``words`` words, from the start again when they run out."""
        repeats = -(-words // len(self.words))
        return " ".join((self.words * repeats)[:words])


@functools.cache
def load(name: str = DEFAULT) -> Haystack:
    """The words of the text file ``name``, or of the prose in Python's own documentation."""
    if name == DEFAULT:
        from pydoc_data.topics import topics

        text = " ".join(topics[topic] for topic in sorted(topics))
    else:
        path = Path(name).expanduser()
        text = untrusted.read_bytes(path, "--haystack").decode(errors="replace")
    words = tuple(text.split())
    if not words:
        raise ConfigError("--haystack", name, "holds no words")
    return Haystack(private.hide(name), words, hashlib.sha256(" ".join(words).encode()).hexdigest()[:16])


def sentences(text: str) -> list[str]:
    """``text`` cut behind . ! ? and spaces."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]
