"""Based's linear attention (Arora et al. 2024, arXiv 2402.18668): the exponential to second order.

o_t = sum_{s <= t} A_ts v_s / (sum_{s <= t} A_ts + eps),   A_ts = 1 + x + x^2 / 2,   x = q_t . k_s / sqrt(d)
A_ts = f(q_t) . f(k_s),   f(x) = [1, x_i / d^(1/4), x_i^2 / sqrt(2 d), x_i x_j / sqrt(d) for i < j]
y = W_o o, no convolution, gate or norm; the paper has windows of 64 and short convolutions beside it.
f has (d + 1)(d + 2) / 2 features, as in FLA; the authors' code keeps both x_i x_j and x_j x_i.
"""

import dataclasses

from hybridlm.errors import ConfigError
from hybridlm.fields import NonNegative, Positive
from hybridlm.linear_mixer import Heads
from hybridlm.mixers import feature_map as maps


@dataclasses.dataclass(frozen=True)
class Config(maps.Config):
    """Based.

    head_dim: d, channels of q and k per head before the map.  v_head_dim: 0 is d_model / num_heads.
    """

    num_heads: Positive = 16
    head_dim: Positive = 16
    feature_map: maps.Map = "taylor"
    eps: NonNegative = 1e-6
    output_norm: bool = False

    def heads(self, d_model: int) -> Heads:
        value = self.v_head_dim or d_model // self.num_heads
        return Heads(self.num_heads, self.num_heads, self.head_dim, value)

    def check(self, d_model: int) -> None:
        if d_model % self.num_heads and not self.v_head_dim:
            raise ConfigError(
                "num_heads", self.num_heads, f"must divide d_model = {d_model} where v_head_dim is 0"
            )
        super().check(d_model)


class Mixer(maps.Mixer):
    config_class = Config
