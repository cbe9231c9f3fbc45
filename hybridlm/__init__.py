"""Train hybrid linear-attention language models; start at docs/reading.md."""

import importlib.metadata

from hybridlm import commands

try:
    __version__ = importlib.metadata.version("hybridlm")
except importlib.metadata.PackageNotFoundError:  # a clone that is not installed
    __version__ = "source"

commands.refuse_others()
