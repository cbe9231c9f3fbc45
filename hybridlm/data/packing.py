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
from typing import NamedTuple

import numpy as np

from hybridlm.data.source import Batch, View, empty_rows, permutation
from hybridlm.data.tokenizer import Tokenizer

DOCUMENT_ORDER, ROW_ORDER = 0, 1  # keep the two permutations of an epoch independent


@dataclasses.dataclass(frozen=True)
class Documents:
    """Tokenised documents, N of them, in one flat array or several (memory-mapped shards).

    arrays: flat tokens.  shard_N: the array that a document lies in.  start_N: its place there.
    length_N: its tokens, the separator at its start included; at least 2.
    digest: names the content.
    """

    arrays: tuple[np.ndarray, ...]
    shard_N: np.ndarray
    start_N: np.ndarray
    length_N: np.ndarray
    digest: str


class _Epoch(NamedTuple):
    order_N: np.ndarray  # documents as they are concatenated
    end_N: np.ndarray  # tokens up to the end of each, in that order
    row_order: np.ndarray | None  # None: rows are read as they lie


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
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)  # a batch can span two epochs

    def describe(self) -> str:
        padding = self.num_rows * self.view.seq_len - self.num_tokens
        return (
            f"{len(self.documents.length_N):,} documents, {self.num_tokens:,} tokens, "
            f"{self.num_rows:,} rows of {self.view.seq_len} ({padding} padding tokens in the last)"
        )

    def rows(self, index_B: np.ndarray) -> Batch:
        batch = empty_rows(len(index_B), self.view.seq_len)
        for b, index in enumerate(index_B.tolist()):
            epoch, place = divmod(index, self.num_rows)
            self._fill({name: array[b] for name, array in batch.items()}, self._epoch(epoch), place)
        return batch

    def _shuffle(self, epoch: int) -> _Epoch:
        order_N = permutation(len(self.documents.length_N), self.seed, epoch, DOCUMENT_ORDER)
        rows = permutation(self.num_rows, self.seed, epoch, ROW_ORDER) if self.shuffle_rows else None
        return _Epoch(order_N, np.cumsum(self.documents.length_N[order_N]), rows)

    def _fill(self, row: Batch, epoch: _Epoch, place: int) -> None:
        if epoch.row_order is not None:
            place = int(epoch.row_order[place])
        begin = place * self.view.seq_len
        stop = min(begin + self.view.seq_len, self.num_tokens)
        first = int(np.searchsorted(epoch.end_N, begin, side="right"))
        at, rank = begin, first
        while at < stop:
            document = epoch.order_N[rank]
            length, end = int(self.documents.length_N[document]), int(epoch.end_N[rank])
            flat = self.documents.arrays[self.documents.shard_N[document]]
            source = int(self.documents.start_N[document]) + at - (end - length)
            count = min(end, stop) - at
            piece = slice(at - begin, at - begin + count)
            row["tokens"][piece] = flat[source : source + count]
            row["targets"][piece][:-1] = row["tokens"][piece][1:]
            row["targets"][piece][-1] = flat[source + count] if at + count < end else self.tokenizer.doc_id
            row["segment_ids"][piece] = rank - first + 1
            row["positions"][piece] = np.arange(count)
            at, rank = at + count, rank + 1
