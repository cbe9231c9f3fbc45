"""Data kind "joint_recall": what a key means depends on the context that it stands in.

Deng et al. 2025, HAX (arXiv 2507.00449), with the ids and the layout of their generator: a value is drawn for
each pair of context and key, and both halves of

    <bos> [c (k v) * keys] * contexts <sep> [c (k v) * keys] * contexts

have every pair, contexts and the keys in each in a random order of their own. Targets are the values of the
second half, each at its key; they stay in the input. To be right a model keeps the last context and looks up
a composite key. Guessing gets 1/16; picking among the values that a key had in the first half gets more.
"""

import dataclasses
from typing import Annotated

import numpy as np

from hybridlm.data import generated
from hybridlm.data.generated import BLOCK, Examples, Generated, need, no_targets
from hybridlm.data.source import View
from hybridlm.fields import Limits

BOS, SEPARATOR = 1, 4
IDS = 16  # of values, of keys and of contexts
VALUES, KEYS, CONTEXTS = 10, 26, 42  # the first of each
VOCABULARY = CONTEXTS + IDS
Some = Annotated[int, Limits(1, IDS)]


@dataclasses.dataclass(frozen=True)
class Config(generated.Config):
    """contexts, keys: of an example, 1 to 16 each; published are all pairs of 5 to 16."""

    contexts: Some = 8
    keys: Some = 8

    def open(self, view: View) -> Generated:
        contexts, keys = self.contexts, self.keys
        need(view, "kind", "joint_recall", vocab_size=VOCABULARY)
        need(view, "contexts", f"{contexts} contexts, {keys} keys", seq_len=length(contexts, keys))
        name = f"joint recall of {keys} keys in each of {contexts} contexts"
        make, entropy = lambda rng: _make(rng, contexts, keys), (7, contexts, keys)
        return Generated(make, view, self, name=name, length=length(contexts, keys), entropy=entropy)


def length(contexts: int, keys: int) -> int:
    """Tokens of an example."""
    return 2 + 2 * contexts * (1 + 2 * keys)


def _make(rng: np.random.Generator, contexts: int, keys: int) -> Examples:
    some = lambda number: rng.permuted(np.tile(np.arange(IDS), (BLOCK, 1)), axis=1)[:, :number]
    context_BC, key_BK = some(contexts), some(keys)
    value_BCK = rng.integers(IDS, size=(BLOCK, contexts, keys))
    example = np.arange(BLOCK)[:, None]

    def half() -> np.ndarray:
        """Every pair once, [BLOCK, contexts * (1 + 2 * keys)]."""
        order_BC = rng.permuted(np.tile(np.arange(contexts), (BLOCK, 1)), axis=1)
        order_BCK = rng.permuted(np.tile(np.arange(keys), (BLOCK, contexts, 1)), axis=2)
        out = np.zeros((BLOCK, contexts, 1 + 2 * keys), np.int64)
        out[:, :, 0] = CONTEXTS + context_BC[example, order_BC]
        out[:, :, 1::2] = KEYS + key_BK[example[:, :, None], order_BCK]
        out[:, :, 2::2] = VALUES + value_BCK[example[:, :, None], order_BC[:, :, None], order_BCK]
        return out.reshape(BLOCK, -1)

    first, second = half(), half()
    mark = lambda token: np.full((BLOCK, 1), token)
    tokens = np.concatenate([mark(BOS), first, mark(SEPARATOR), second], axis=1).astype(np.int32)
    targets = no_targets(tokens)
    is_key = (tokens >= KEYS) & (tokens < CONTEXTS)
    is_key[:, : 2 + first.shape[1]] = False
    targets[is_key] = np.roll(tokens, -1, axis=1)[is_key]
    return tokens, targets
