"""The normalised arguments of one step; shape legend as in linear_attention/call.py, B any leading axes."""

import dataclasses
from typing import Any

import jax

from pallas_kernels.linear_attention.call import QKV


@dataclasses.dataclass(frozen=True)
class StepCall(QKV):
    """state: [..., HV, K, V].  q, k: [..., H, K].  v: [..., HV, V].

    log_decay: None, [..., HV] or [..., HV, K].  beta: None or [..., HV].
    Backends return o and the state in the state's dtype.
    """

    state: jax.Array
    log_decay: jax.Array | None
    beta: jax.Array | None
    scale: float
    qk_l2norm: bool = False
    interpret: bool = False

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What is differentiated, in the order of `reference.update`."""
        return self.state, self.q, self.k, self.v, self.log_decay, self.beta
