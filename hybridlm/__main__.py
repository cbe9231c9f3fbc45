"""python -m hybridlm: the commands."""

from hybridlm import commands

if __name__ == "__main__":
    print(f"hybridlm is no command. Commands, each with --help:\n{commands.listing()}")
