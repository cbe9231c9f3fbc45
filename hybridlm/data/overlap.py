"""Held-out documents that are trained on, too: found among the longest, without reading the rest."""

import contextlib
from collections.abc import Iterator

import numpy as np

from hybridlm.data.mixture import Mixture
from hybridlm.data.packing import Documents, PackedDocuments
from hybridlm.data.source import Source
from hybridlm.errors import RunError

LONGEST = 16  # held-out documents that are looked for
SHORTEST = 24  # tokens; shorter ones are alike by chance
SAME_LENGTH = 32  # training documents that each is held against
BEGINNING = 4096  # tokens that are compared


def warning(train: Source, held: Source, field: str) -> str:
    """Why the loss on ``held`` is none on new text: at least half of its longest documents are also among
    the training ones; "" otherwise.  field: of the config that names it."""
    looked = [(one, number) for one in _documents(held) for number in _longest(one)]
    lengths = np.unique([one.length_N[number] for one, number in looked])
    alike = [(one, np.flatnonzero(np.isin(one.length_N, lengths))) for one in _documents(train)]
    known = [one.name(number) for one, number in looked if any(_holds(*t, one, number) for t in alike)]
    if not known or 2 * len(known) < len(looked):
        return ""
    said = f"{field}: of the {len(looked)} longest held-out documents {len(known)} are trained on, too"
    return f"{said} ({known[0]}): their loss says nothing of new text. Hold out other documents."


def _documents(source: Source) -> Iterator[Documents]:
    if isinstance(source, PackedDocuments):
        yield source.documents
    for component in source.sources if isinstance(source, Mixture) else ():
        yield from _documents(component)


def _longest(documents: Documents) -> list[int]:
    """Few others are as long."""
    found_N = np.argsort(-documents.length_N, kind="stable")[:LONGEST]
    return found_N[documents.length_N[found_N] >= SHORTEST].tolist()


def _holds(documents: Documents, among_N: np.ndarray, other: Documents, number: int) -> bool:
    """Whether one ``among_N`` of ``documents`` is that of ``other``, by length and beginning.

    Not where a file cannot be read, as is said later.
    """
    same_N = among_N[documents.length_N[among_N] == other.length_N[number]][:SAME_LENGTH]
    if not len(same_N):
        return False
    with contextlib.suppress(RunError):
        wanted = _tokens(other, number)
        return any(np.array_equal(_tokens(documents, one), wanted) for one in same_N.tolist())
    return False


def _tokens(documents: Documents, number: int) -> np.ndarray:
    start, length = int(documents.start_N[number]), int(documents.length_N[number])
    return documents.read(int(documents.shard_N[number]), start, start + min(length, BEGINNING))
