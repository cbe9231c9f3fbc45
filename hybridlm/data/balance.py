"""Documents of a row in an order that evens out attention's work, for rows that are cut over devices.

Of 2N blocks of a row device i of N computes for blocks i and 2N - 1 - i (`hybridlm.ring_attention`): even for
one document, not for several. Where a document lies in its row decides which blocks it falls into, and
nothing of what it gives; so of some orders that with the least work of the busiest device is taken. A row
keeps its documents.

Shape legend: T tokens of a row, D documents in it, C orders that are tried.
"""

import numpy as np

from hybridlm.data.source import Batch

TRIED = 256  # orders, at most; with a quarter of them the busiest device has 1 to 5% more
SHORT = 512  # tokens of a row for each order that is tried: to read a short row takes as long as a few
SORTED = 1 << 20  # documents of all orders, at most


def evened(batch: Batch, pieces: int) -> Batch:
    """``batch`` of whole rows, each of which will be cut over ``pieces`` devices, with its documents moved.

    A function of the rows' lengths of documents alone. Segments still count from 1; padding goes last.
    """
    if pieces == 1:
        return batch
    moved = {name: array.copy() for name, array in batch.items()}
    for b, ids in enumerate(batch["segment_ids"]):
        starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
        lengths, real = np.diff(starts, append=len(ids)), ids[starts] > 0
        chosen = order(lengths[real], len(ids), pieces)
        documents = np.concatenate([np.flatnonzero(real)[chosen], np.flatnonzero(~real)])
        place = np.concatenate([np.arange(starts[d], starts[d] + lengths[d]) for d in documents])
        for name, array in batch.items():
            moved[name][b] = array[b, place]
        rank = np.where(real[documents], np.arange(1, len(documents) + 1), 0)
        moved["segment_ids"][b] = np.repeat(rank, lengths[documents])
    return moved


def order(length_D: np.ndarray, tokens: int, pieces: int) -> np.ndarray:
    """Of documents of these lengths at the front of a row: the best order of those tried."""
    count = len(length_D)
    tried = min(TRIED, tokens // SHORT, SORTED // max(count, 1))
    if count < 2 or tried < 2:
        return np.arange(count)
    words = np.random.Philox(np.random.SeedSequence((count, tried))).random_raw(count * tried)
    order_CD = np.argsort(words.reshape(tried, count), axis=1, kind="stable")
    order_CD[0] = np.arange(count)  # no row gets worse
    return order_CD[np.argmin(np.max(work(length_D[order_CD], tokens, pieces), axis=1))]


def work(length_CD: np.ndarray, tokens: int, pieces: int) -> np.ndarray:
    """Pairs of query and key that each of ``pieces`` devices computes, int64 [C, pieces], of C rows."""
    length_CD = length_CD.astype(np.int64)
    start = lambda x: np.pad(np.cumsum(x, axis=1), [(0, 0), (1, 0)])
    begin, before = start(length_CD), start(length_CD * (length_CD + 1) // 2)
    edge_CN = np.minimum(np.arange(2 * pieces + 1) * tokens // (2 * pieces), begin[:, -1:])
    # One search in all rows, which a multiple of their length keeps apart.
    apart = (tokens + 1) * np.arange(len(begin))[:, None]
    found = np.searchsorted((begin + apart).ravel(), (edge_CN + apart).ravel(), side="right") - 1
    inside = edge_CN - begin.ravel()[found].reshape(edge_CN.shape)
    done = before.ravel()[found].reshape(edge_CN.shape) + inside * (inside + 1) // 2
    blocks = np.diff(done, axis=1)
    return blocks[:, :pieces] + blocks[:, : pieces - 1 : -1]
