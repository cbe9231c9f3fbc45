"""Documents packed into rows: concatenated in the order of an epoch, then split every T tokens.

A document is its separator followed by its tokens. Every token is read once and predicted once an epoch: the
target of a token is the next one of its document, and the last token's target is the separator, which thereby
marks the end as well. A document that a row cannot hold continues in the next row as a segment of its own,
positions from 0: no state passes between rows. Only the last row of an epoch is padded.

Bits per byte divide the summed loss of all targets, separators included, by the bytes that the targets stand
for, of which a separator has none: the length of a code from which the documents and their ends can be read.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from hybridlm.data.source import Batch, View, empty_rows, permutation
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import RunError

DOCUMENT_ORDER, ROW_ORDER = 0, 1  # keep the two permutations of an epoch independent


@dataclasses.dataclass(frozen=True)
class Documents:
    """Tokenised documents, N of them, in one flat array or several (shards).

    read: (shard, start, stop) -> tokens; a RunError where the shard's file is gone or cut short.
    shard_N: the shard that a document lies in.  start_N: its place there.
    length_N: its tokens, the separator at its start included; at least 2.
    digest: names the content.
    name: document -> where it is found.
    checks: each reads a stored file whole and raises RunError when it is not what was written.
    """

    read: Callable[[int, int, int], np.ndarray]
    shard_N: np.ndarray
    start_N: np.ndarray
    length_N: np.ndarray
    digest: str
    name: Callable[[int], str] = str
    checks: tuple[Callable[[], None], ...] = ()


class _Epoch(NamedTuple):
    order_N: np.ndarray  # documents as they are concatenated
    end_N: np.ndarray  # tokens up to the end of each, in that order
    row_order: np.ndarray | None  # None: rows are read as they lie


class _Piece(NamedTuple):
    """The part of a row that one document gives. rank: of the document in the row, from 0."""

    rank: int
    document: int
    offset: int  # in the document
    place: slice  # in the row


class PackedDocuments:
    """Source of rows cut from documents, reshuffled every epoch.

    In training both documents and rows are shuffled: documents alone would put the pieces of a long one into
    the same batch. Held-out rows keep the order of the (shuffled) documents, so that a few batches are a fair
    sample and still read as text.
    """

    def __init__(self, documents: Documents, tokenizer: Tokenizer, view: View):
        self.documents, self.tokenizer, self.view = documents, tokenizer, view
        self.vocab_size = tokenizer.vocab_size
        self.num_tokens = int(documents.length_N.sum())
        self.num_rows = -(-self.num_tokens // view.seq_len)
        self.shuffle_rows = view.split == "train"
        self.seed = view.seed if view.split == "train" else 0
        self.fingerprint = (
            f"{documents.digest} {tokenizer.fingerprint} {view.split} {view.seq_len} {self.seed}"
        )
        self.checks = documents.checks
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)  # a batch can span two epochs

    def describe(self) -> str:
        padding = self.num_rows * self.view.seq_len - self.num_tokens
        longer = int((self.documents.length_N > self.view.seq_len).sum())
        count = len(self.documents.length_N)
        return (
            f"{count:,} document{'' if count == 1 else 's'} ({longer:,} longer than a row), "
            f"{self.num_tokens:,} tokens, {self.num_rows:,} rows of {self.view.seq_len} "
            f"({padding} padding tokens in the last)"
        )

    def ids(self, index_B: np.ndarray) -> list[str]:
        return [", ".join(map(self._said, self._pieces(index))) for index in index_B.tolist()]

    def _said(self, piece: _Piece) -> str:
        end = piece.offset + piece.place.stop - piece.place.start - 1
        return f"{self.documents.name(piece.document)} tokens {piece.offset} to {end}"

    def rows(self, index_B: np.ndarray) -> Batch:
        """RunError when a file is gone or holds ids that the tokenizer does not have."""
        batch = empty_rows(len(index_B), self.view.seq_len)
        for b, index in enumerate(index_B.tolist()):
            self._fill({name: array[b] for name, array in batch.items()}, index)
        if (largest := int(batch["tokens"].max(initial=0))) >= self.vocab_size:
            named = next(text for text, row in zip(self.ids(index_B), batch["tokens"], strict=True)
                         if row.max() >= self.vocab_size)  # fmt: skip
            raise RunError(
                f"data: token id {largest} is beyond the vocabulary of {self.vocab_size}, in {named}."
            )
        return batch

    def _shuffle(self, epoch: int) -> _Epoch:
        order_N = permutation(len(self.documents.length_N), self.seed, epoch, DOCUMENT_ORDER)
        rows = permutation(self.num_rows, self.seed, epoch, ROW_ORDER) if self.shuffle_rows else None
        return _Epoch(order_N, np.cumsum(self.documents.length_N[order_N]), rows)

    def _pieces(self, index: int) -> Iterator[_Piece]:
        """What row ``index`` is made of, in order."""
        number, place = divmod(index, self.num_rows)
        epoch = self._epoch(number)
        if epoch.row_order is not None:
            place = int(epoch.row_order[place])
        begin = place * self.view.seq_len
        stop = min(begin + self.view.seq_len, self.num_tokens)
        first = int(np.searchsorted(epoch.end_N, begin, side="right"))
        at, rank = begin, first
        while at < stop:
            document, end = int(epoch.order_N[rank]), int(epoch.end_N[rank])
            offset = at - (end - int(self.documents.length_N[document]))
            until = min(end, stop)
            yield _Piece(rank - first, document, offset, slice(at - begin, until - begin))
            at, rank = until, rank + 1

    def _fill(self, row: Batch, index: int) -> None:
        documents = self.documents
        for rank, document, offset, place in self._pieces(index):
            start, count = int(documents.start_N[document]) + offset, place.stop - place.start
            ends = offset + count == documents.length_N[document]
            read = documents.read(int(documents.shard_N[document]), start, start + count + (not ends))
            row["tokens"][place] = read[:count]
            row["targets"][place][: len(read) - 1] = read[1:]
            if ends:
                row["targets"][place][-1] = self.tokenizer.doc_id
            row["segment_ids"][place] = rank + 1
            row["positions"][place] = np.arange(count)
