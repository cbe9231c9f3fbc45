"""Runs a command from anywhere, a wheel too: python -m hybridlm eval.compare runs/a runs/b"""

import sys

from hybridlm import commands

if __name__ == "__main__":
    commands.named(sys.argv[1:])
