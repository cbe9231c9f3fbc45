"""Data kind "stack": many stacks at once; say what comes off (Kimi Linear, arXiv 2510.26692, section 5.1).

An operation is three tokens, "<push> id element" or "<pop> id element"; the element of a pop is predicted,
from the id before it. Which operation, which stack and which element are uniform where they are free: the
paper does not say, nor does it state the number of elements. A pop picks a stack that is not empty; the first
operation, and any while all stacks are empty, is a push.

Ids: 0 is <push>, 1 is <pop>, then the stacks, then the elements, which are the rest of the vocabulary.
"""

import dataclasses

import numpy as np

from hybridlm.data import generated
from hybridlm.data.generated import BLOCK, Examples, Generated, need, no_targets
from hybridlm.data.source import View
from hybridlm.fields import Positive

PUSH, POP, FIRST_STACK = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Config(generated.Config):
    """num_stacks: the paper has 64."""

    num_stacks: Positive = 64

    def open(self, view: View) -> Generated:
        stacks, length = self.num_stacks, view.seq_len // 3 * 3
        need(view, "kind", "stack", seq_len=6, vocab_size=FIRST_STACK + stacks + 2)
        make, entropy = lambda rng: _make(rng, stacks, length // 3, view.vocab_size), (2, stacks, length)
        return Generated(make, view, self, name=f"stack {stacks}", length=length, entropy=entropy)


def _make(rng: np.random.Generator, stacks: int, operations: int, vocab: int) -> Examples:
    tokens = np.empty((BLOCK, operations, 3), np.int32)
    is_pop = np.zeros((BLOCK, operations), bool)
    coin = rng.random((BLOCK, operations)) < 0.5
    pick = rng.random((BLOCK, operations))
    element = rng.integers(FIRST_STACK + stacks, vocab, size=(BLOCK, operations), dtype=np.int32)
    example = np.arange(BLOCK)
    held = np.zeros((BLOCK, stacks, operations), np.int32)
    height = np.zeros((BLOCK, stacks), np.int64)
    for i in range(operations):
        filled = height > 0
        pop = is_pop[:, i] = coin[:, i] & filled.any(axis=1)
        allowed = np.where(pop[:, None], filled, True)
        rank = np.floor(pick[:, i] * allowed.sum(axis=1)).astype(np.int64)  # the rank-th stack allowed
        stack = np.argmax(np.cumsum(allowed, axis=1) > rank[:, None], axis=1)
        top = np.where(pop, height[example, stack] - 1, height[example, stack])
        moved = np.where(pop, held[example, stack, top], element[:, i])
        held[example, stack, top] = moved
        height[example, stack] += np.where(pop, -1, 1)
        tokens[:, i] = np.stack([np.where(pop, POP, PUSH), FIRST_STACK + stack, moved], axis=1)
    targets = no_targets(tokens)
    targets[:, :, 1] = np.where(is_pop, tokens[:, :, 2], targets[:, :, 1])
    return tokens.reshape(BLOCK, -1), targets.reshape(BLOCK, -1)
