"""Committed choices by shape class, from benchmarks/kernels.py on one H100; nothing is tuned at run time."""

from typing import NamedTuple

SMS = 132


class Choice(NamedTuple):
    """value_tile: values (64 or 128) a block of threads works on.  pieces: runs a sequence is cut into."""

    value_tile: int
    pieces: int = 1


def forward(k_shape: tuple[int, ...], v_shape: tuple[int, ...], delta: bool) -> Choice:
    batch, length, _, _ = k_shape
    heads, value_dim = v_shape[2:]
    value_tile = 128 if value_dim % 128 == 0 and batch * heads * value_dim // 128 >= 96 else 64
    return Choice(value_tile)


def backward(k_shape: tuple[int, ...], v_shape: tuple[int, ...]) -> tuple[int, int]:
    """(values a block of threads of the reverse scan works on, chunks a block of the chunk kernel takes)."""
    batch, _, _, _ = k_shape
    heads, value_dim = v_shape[2:]
    return (128 if value_dim % 128 == 0 and batch * heads * value_dim // 128 >= 96 else 64), 4
