"""What needs no model: bits per byte that any text compresses to, to set a model's figure beside."""

import gzip

import numpy as np


def order0_bits_per_byte(text: bytes) -> float:
    """Entropy of the bytes' own frequencies: the best that a model without context could do on ``text``."""
    counts = np.bincount(np.frombuffer(text, np.uint8))
    shares = counts[counts > 0] / len(text)
    return float(-(shares * np.log2(shares)).sum())


def gzip_bits_per_byte(text: bytes) -> float:
    """Size under gzip -9, its 18 bytes of frame included; it adapts to ``text`` alone, window 32 KiB."""
    return 8 * len(gzip.compress(text, compresslevel=9)) / len(text)
