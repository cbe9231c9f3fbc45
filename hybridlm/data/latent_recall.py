"""Data kind "latent_recall": what is asked for has no token in common with what was said.

After NoLiMa (Modarressi et al. 2025, arXiv 2502.05167), whose needles and questions share no word; its data
may not be used commercially, so this is the same in tokens. A fixed map pi of cues to topics stands behind
all examples, training and held out. An example states ``pairs`` cues, each with a value, then asks for them
in another order by their topics:

    cue_1 value_1 cue_2 value_2 ... <ask> pi(cue_7) pi(cue_3) ...

The target at each topic is the value that stood behind its cue; no answer is fed back. Cues and topics are
each a quarter of the ids, values half of them. With pi the identity this is nearly MQAR: what is lost
against it at as many pairs is what the map costs.
"""

import dataclasses

import numpy as np

from hybridlm.data import generated
from hybridlm.data.generated import BLOCK, Examples, Generated, draw_distinct, need, no_targets
from hybridlm.data.source import View, permutation
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Positive

MAP_SEED = 2502


@dataclasses.dataclass(frozen=True)
class Config(generated.Config):
    """pairs: of an example.
    concepts: cues, and as many topics; 0 is a quarter of the ids.
    """

    pairs: Positive = 8
    concepts: Count = 0

    def open(self, view: View) -> Generated:
        pairs, count, vocab = self.pairs, self.concepts or (view.vocab_size - 1) // 4, view.vocab_size
        need(view, "pairs", pairs, seq_len=length(pairs))
        if not pairs <= count or 2 * count + 2 > vocab:
            allowed = f"needs pairs <= concepts and 2 * concepts + 2 <= model.vocab_size = {vocab}"
            raise ConfigError("concepts", self.concepts, f"{allowed}, here {pairs} pairs of {count}")

        def make(rng: np.random.Generator) -> Examples:
            """<ask> is 0, cues 1 .. count, topics the next ``count``, values the rest."""
            cue = draw_distinct(rng, 0, count, pairs)
            value = rng.integers(1 + 2 * count, vocab, size=(BLOCK, pairs), dtype=np.int32)
            order = rng.permuted(np.tile(np.arange(pairs), (BLOCK, 1)), axis=1)
            tokens = np.zeros((BLOCK, length(pairs)), np.int32)
            tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = 1 + cue, value
            tokens[:, 2 * pairs + 1 :] = 1 + count + topics(count)[np.take_along_axis(cue, order, axis=1)]
            targets = no_targets(tokens)
            targets[:, 2 * pairs + 1 :] = np.take_along_axis(value, order, axis=1)
            return tokens, targets

        name = f"latent recall of {pairs} pairs, {count} concepts"
        return Generated(make, view, self, name=name, length=length(pairs), entropy=(10, pairs, count))


def length(pairs: int) -> int:
    """Tokens of an example."""
    return 3 * pairs + 1


def topics(count: int) -> np.ndarray:
    """pi, int64 [count]: the rank of each cue's topic."""
    return permutation(count, MAP_SEED)
