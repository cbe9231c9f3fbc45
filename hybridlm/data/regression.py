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
from hybridlm.data.generated import BLOCK, Examples, Generated, need, no_targets
from hybridlm.data.source import View
from hybridlm.fields import Count, Limits


@dataclasses.dataclass(frozen=True)
class Config(generated.Config):
    """features: d.
    segment: pairs with the same weights; 0 is all of a row.
    """

    features: Annotated[int, Limits(1, 12)] = 6
    segment: Count = 0

    def open(self, view: View) -> Generated:
        features, pairs = self.features, view.seq_len // 2
        need(view, "kind", "regression", vocab_size=2**features + 2 * features + 1, seq_len=4)
        segment = self.segment or pairs

        def make(rng: np.random.Generator) -> Examples:
            """Corners are 0 .. 2^d - 1, bit j set where x_j is 1 and not -1; answer y is 2^d + d + y."""
            corner = rng.integers(2**features, size=(BLOCK, pairs))
            drawn = rng.integers(-1, 2, size=(BLOCK, -(-pairs // segment), features))
            weights = np.repeat(drawn, segment, axis=1)[:, :pairs]
            tokens = np.empty((BLOCK, 2 * pairs), np.int32)
            tokens[:, 0::2] = corner
            tokens[:, 1::2] = 2**features + features + (weights * corners(features)[corner]).sum(axis=-1)
            targets = no_targets(tokens)
            targets[:, 0::2] = tokens[:, 1::2]
            return tokens, targets

        name = f"regression on {features} features, segments of {segment}"
        entropy = (14, features, self.segment, pairs)
        return Generated(make, view, self, name=name, length=2 * pairs, entropy=entropy)


def constant(features: int) -> float:
    """Share of answers that are 0: each feature adds -1, 0 or 1, equally often."""
    spread = np.ones(1)
    for _ in range(features):
        spread = np.convolve(spread, np.ones(3) / 3)
    return float(spread[features])


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
