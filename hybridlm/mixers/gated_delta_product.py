"""Gated DeltaProduct (Siems et al. 2025, arXiv 2502.10297): Gated DeltaNet with several Householder steps.

S_{t,0} = a_t S_{t-1,n}, one decay a token, then the n steps of `delta_product`; else as `gated_delta_net`.
"""

import dataclasses
from typing import ClassVar

from hybridlm.fields import Positive
from hybridlm.mixers import gated_delta_net
from hybridlm.mixers.delta_product import FLA, ProductMixer, Steps


@dataclasses.dataclass(frozen=True)
class Config(Steps, gated_delta_net.Config):
    """Gated DeltaProduct. Heads are half as wide as Gated DeltaNet's (and FLA's): the kernels take them."""

    head_dim: Positive = 128


class Mixer(ProductMixer, gated_delta_net.Mixer):
    config_class = Config
    public: ClassVar = {"fla": FLA}
