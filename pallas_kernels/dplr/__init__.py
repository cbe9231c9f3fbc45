"""Linear attention with a diagonal plus low-rank transition: `op` checks a call, a backend computes it."""

from pallas_kernels.dplr.op import dplr

__all__ = ["dplr"]
