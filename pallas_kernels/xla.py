"""Chunkwise linear attention in plain JAX (for now the token loop)."""

from pallas_kernels.reference import linear_attention, supports

__all__ = ["linear_attention", "supports"]
