"""Text from a model: `sampling`, `decoding` (the programs), `chat` (templates); `python -m hybridlm.generate`."""

from hybridlm.generate.decoding import (
    PREFILL_CHUNK,
    bucket,
    complete,
    continuations,
    generate,
    left_pad,
    prefill,
    stream,
)
from hybridlm.generate.sampling import GREEDY, Sampling, sample

__all__ = [
    "GREEDY",
    "PREFILL_CHUNK",
    "Sampling",
    "bucket",
    "complete",
    "continuations",
    "generate",
    "left_pad",
    "prefill",
    "sample",
    "stream",
]
