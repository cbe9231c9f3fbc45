"""Committed choices by shape class, from benchmarks/choices.py on one H100; nothing is tuned at run time."""

from typing import NamedTuple

WIDE = 96  # blocks of threads of 128 values from which the memory, not the chain of products, sets the pace
FILL = 128  # blocks of threads that fill the 132 multiprocessors
LONG = 160  # chunks from which cutting a sequence repays the extra scan and the joins
SHORT_WALKS = LED = True  # see warm_up.py
WIDEST_KEY = 128  # channels of the heads that the scans with a copy of the state in registers take


class Choice(NamedTuple):
    """value_tile: values (64 or 128) a block of threads works on.  pieces: runs a sequence is cut into.
    led: runs of a sequence not in pieces, of which each walks what comes before it itself (warm_up.py).
    """

    value_tile: int
    pieces: int = 1
    led: int = 1


def forward(k_shape: tuple[int, ...], v_shape: tuple[int, ...]) -> Choice:
    """k_shape [B, T, H, K] and v_shape [B, T, HV, V], T padded to whole chunks."""
    chunks = k_shape[1] // 64
    blocks = k_shape[0] * v_shape[2] * v_shape[3] // 64  # with 64 values each
    if v_shape[3] % 128 == 0 and blocks // 2 >= WIDE:
        return Choice(128)
    if k_shape[3] != v_shape[3]:  # their pieces have been interpreted, but never run on a GPU
        return Choice(64)
    pieces = 1
    while chunks >= LONG and chunks % (2 * pieces) == 0 and 4 <= FILL // blocks >= 2 * pieces and pieces < 16:
        pieces *= 2
    led = 1
    while LED and pieces == 1 and chunks % (2 * led) == 0 and chunks >= 16 * led and 2 * led * blocks <= FILL:
        led *= 2
    return Choice(64, pieces, led)


def backward(k_shape: tuple[int, ...], v_shape: tuple[int, ...], delta: bool) -> Choice:
    """As `forward`. With the delta rule the same, so that both passes share what the pieces do to the state;
    additive, a block of threads takes all values of a head."""
    if delta:
        return forward(k_shape, v_shape)
    if k_shape[3] != v_shape[3]:
        return Choice(v_shape[3])
    pieces, chunks, blocks = 1, k_shape[1] // 64, k_shape[0] * v_shape[2]
    while chunks >= LONG and chunks % (2 * pieces) == 0 and 2 * pieces * blocks <= FILL and pieces < 16:
        pieces *= 2
    return Choice(v_shape[3], pieces)


def one_pass(k_shape: tuple[int, ...], v_shape: tuple[int, ...]) -> bool:
    """Whether KDA and GLA are one pass each way: where a block of threads a head fills the GPU."""
    blocks, each = k_shape[0] * v_shape[2], 132
    fits = (k_shape[3], v_shape[3]) == (128, 128) and k_shape[1] >= 1024
    return fits and blocks >= WIDE * -(-blocks // each)
