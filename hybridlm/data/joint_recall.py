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
from hybridlm.data.generated import BLOCK, Generated, check_vocab, no_targets
from hybridlm.data.source import Source, View
from hybridlm.errors import ConfigError
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


def length(contexts: int, keys: int) -> int:
    """Tokens of an example."""
    return 2 + 2 * contexts * (1 + 2 * keys)


def open_source(config: Config, view: View) -> Source:
    size = length(config.contexts, config.keys)
    check_vocab("joint_recall", VOCABULARY, view)
    if view.seq_len < size:
        sizes = f"{config.contexts} contexts, {config.keys} keys"
        raise ConfigError("contexts", sizes, f"needs train.seq_len >= {size}, here {view.seq_len}")
    return Generated(
        lambda rng: _make(rng, config.contexts, config.keys),
        view, config, name=f"joint recall of {config.keys} keys in each of {config.contexts} contexts",
        length=size, entropy=(7, config.contexts, config.keys),
    )  # fmt: skip


def _make(rng: np.random.Generator, contexts: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    some = lambda number: rng.permuted(np.tile(np.arange(IDS), (BLOCK, 1)), axis=1)[:, :number]
    context_BC, key_BK = some(contexts), some(keys)
    value_BCK = rng.integers(IDS, size=(BLOCK, contexts, keys))
    first, second = (_half(rng, context_BC, key_BK, value_BCK) for _ in range(2))
    mark = lambda token: np.full((BLOCK, 1), token)
    tokens = np.concatenate([mark(BOS), first, mark(SEPARATOR), second], axis=1).astype(np.int32)
    targets = no_targets(tokens)
    is_key = (tokens >= KEYS) & (tokens < CONTEXTS)
    is_key[:, : 2 + first.shape[1]] = False
    targets[is_key] = np.roll(tokens, -1, axis=1)[is_key]
    return tokens, targets


def _half(
    rng: np.random.Generator, context_BC: np.ndarray, key_BK: np.ndarray, value_BCK: np.ndarray
) -> np.ndarray:
    """Every pair once, [BLOCK, contexts * (1 + 2 * keys)]."""
    batch, contexts, keys = value_BCK.shape
    order_BC = rng.permuted(np.tile(np.arange(contexts), (batch, 1)), axis=1)
    order_BCK = rng.permuted(np.tile(np.arange(keys), (batch, contexts, 1)), axis=2)
    example = np.arange(batch)[:, None]
    values = value_BCK[example[:, :, None], order_BC[:, :, None], order_BCK]
    out = np.zeros((batch, contexts, 1 + 2 * keys), np.int64)
    out[:, :, 0] = CONTEXTS + context_BC[example, order_BC]
    out[:, :, 1::2] = KEYS + key_BK[example[:, :, None], order_BCK]
    out[:, :, 2::2] = VALUES + values
    return out.reshape(batch, -1)
