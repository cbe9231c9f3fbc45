"""The commands of this repository, and what a module that is none says for itself under `python -m`."""

import sys

COMMANDS = {
    "python train.py": "trains a run",
    "python -m hybridlm.generate": "writes text with one",
    "python -m hybridlm.data.prepare": "makes token shards of text",
    "python -m hybridlm.convert": "public checkpoints in and out",
    "python -m hybridlm.run.replay": "repeats a step that went wrong",
    "python -m eval": "measures recall and memory of a run",
    "python -m eval.harness": "runs tasks of lm-evaluation-harness",
    "python -m launch.sweep": "trains a sweep",
    "python -m launch.report": "makes a sweep's report",
}


def listing() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(f"  {command:{width}}  {about}" for command, about in COMMANDS.items())


def refuse_others() -> None:
    """Ends a `python -m hybridlm.pattern`, which would do nothing, with the list of commands and code 2.

    Python imports the package before the module that it was asked for, and names it in ``orig_argv`` only.
    """
    if sys.argv[:1] != ["-m"]:
        return
    asked = sys.orig_argv[1 + next((i for i, one in enumerate(sys.orig_argv) if one[-1:] == "m"), -1)]
    if not asked.startswith("hybridlm.") or f"python -m {asked}" in COMMANDS:
        return
    print(f"{asked} is no command. Commands, each with --help:\n{listing()}", file=sys.stderr)
    sys.exit(2)
