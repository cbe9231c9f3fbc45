"""Data kind "regression": a linear map is found from its values, in context.

After in-context and test-time regression (Wang et al. 2025, arXiv 2501.12352; Local Linear Attention, arXiv
2510.01450), whose inputs are Gaussian vectors and whose loss is a squared error: here in tokens, so that the
same models and losses serve. An input is one of the 2^d corners of a cube, an id each; weights w, drawn from
{-1, 0, 1}^d for each example, give the answer y = w . x, a whole number from -d to d, an id as well:

    x_1 y_1 x_2 y_2 ...          the target at each x is its y

A table (MQAR) knows the corners that came before; least squares knows all of them once d independent ones
have come (`least_squares`, rounded). With ``segment`` the weights are drawn anew every so many pairs: what
was learnt before misleads, and has to be forgotten. Always 0 is right in `constant`.
"""

import dataclasses
from typing import Annotated

import numpy as np

from hybridlm.data import generated
from hybridlm.data.generated import BLOCK, Generated, check_vocab, no_targets
from hybridlm.data.source import Source, View
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Limits


@dataclasses.dataclass(frozen=True)
class Config(generated.Config):
    """features: d.
    segment: pairs with the same weights; 0 is all of a row.
    """

    features: Annotated[int, Limits(1, 12)] = 6
    segment: Count = 0


def constant(features: int) -> float:
    """Share of answers that are 0: each feature adds -1, 0 or 1, equally often."""
    spread = np.ones(1)
    for _ in range(features):
        spread = np.convolve(spread, np.ones(3) / 3)
    return float(spread[features])


def open_source(config: Config, view: View) -> Source:
    pairs = view.seq_len // 2
    check_vocab("regression", 2**config.features + 2 * config.features + 1, view)
    if pairs < 2:
        raise ConfigError("kind", "regression", f"needs train.seq_len of at least 4, here {view.seq_len}")
    sizes = (config.features, config.segment)
    return Generated(
        lambda rng: _make(rng, config, pairs), view, config, length=2 * pairs, entropy=(14, *sizes, pairs),
        name=f"regression on {config.features} features, segments of {config.segment or pairs}",
    )  # fmt: skip


def _make(rng: np.random.Generator, config: Config, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Corners are 0 .. 2^d - 1, bit j set where x_j is 1 and not -1; answer y is 2^d + d + y."""
    features, segment = config.features, config.segment or pairs
    corner = rng.integers(2**features, size=(BLOCK, pairs))
    drawn = rng.integers(-1, 2, size=(BLOCK, -(-pairs // segment), features))
    weights = np.repeat(drawn, segment, axis=1)[:, :pairs]
    tokens = np.empty((BLOCK, 2 * pairs), np.int32)
    tokens[:, 0::2] = corner
    tokens[:, 1::2] = 2**features + features + (weights * corners(features)[corner]).sum(axis=-1)
    targets = no_targets(tokens)
    targets[:, 0::2] = tokens[:, 1::2]
    return tokens, targets


def corners(features: int) -> np.ndarray:
    """[2^d, d] of -1 and 1: what each id stands for."""
    return 2 * (np.arange(2**features)[:, None] >> np.arange(features) & 1) - 1


def least_squares(tokens: np.ndarray, features: int, segment: int = 0) -> np.ndarray:
    """The answer ids [pairs] that the smallest weights which fit the segment's earlier pairs give.

    tokens: of one example.
    """
    x = corners(features)[tokens[0::2]]
    y = tokens[1::2].astype(np.float64) - 2**features - features
    found = []
    for i in range(len(y)):
        begin = i // segment * segment if segment else 0
        weights = np.linalg.pinv(x[begin:i]) @ y[begin:i] if i > begin else np.zeros(features)
        found.append(round(float(x[i] @ weights)))
    return 2**features + features + np.array(found)
