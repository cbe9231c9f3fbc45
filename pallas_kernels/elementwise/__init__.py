"""The recurrence h_t = exp(g_t) h_{t-1} + x_t: `op` checks a call, one module a backend computes it."""

from pallas_kernels.elementwise.op import elementwise_recurrence
from pallas_kernels.elementwise.pieces import Piece, chain, join, piece, through

__all__ = ["Piece", "chain", "elementwise_recurrence", "join", "piece", "through"]
