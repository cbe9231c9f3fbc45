"""Text from a model: `sampling`, `decoding` (programs), `chat` (templates); `python -m hybridlm.generate`."""

from hybridlm.generate.decoding import bucket, complete, continuations, left_pad, prefill, stream
from hybridlm.generate.sampling import GREEDY, Sampling, sample

__all__ = ["GREEDY", "Sampling", "bucket", "complete", "continuations", "left_pad", "prefill",
           "sample", "stream"]  # fmt: skip
