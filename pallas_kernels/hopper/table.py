"""Committed choices by shape class, from benchmarks/kernels.py on one H100; nothing is tuned at run time."""

from typing import NamedTuple

SMS = 132


class Choice(NamedTuple):
    """value_tile: values (64 or 128) a block of threads works on.  pieces: runs a sequence is cut into.
    run: chunks a warpgroup inverts in a row."""

    value_tile: int
    pieces: int = 1
    run: int = 1


def forward(k_shape: tuple[int, ...], v_shape: tuple[int, ...], delta: bool) -> Choice:
    batch, length, _, _ = k_shape
    heads, value_dim = v_shape[2:]
    chunks = length // 64
    value_tile = 128 if value_dim % 128 == 0 and batch * heads * value_dim // 128 >= 96 else 64
    return Choice(value_tile, 1, max(1, min(8, batch * heads * chunks // (4 * SMS * 2))))
