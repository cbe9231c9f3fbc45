"""The commands of this repository, and what a module that is none says for itself under `python -m`."""

import os
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

COMMANDS = {
    "python train.py": "trains a run",
    "python -m hybridlm.generate": "writes text with one",
    "python -m hybridlm.data.prepare": "makes token shards of text",
    "python -m hybridlm.convert": "public checkpoints in and out",
    "python -m hybridlm.layer_choice": "which layers of a converted model should stay full",
    "python -m hybridlm.run.replay": "repeats a step that went wrong",
    "python -m eval": "measures recall and memory of a run",
    "python -m eval.harness": "runs tasks of lm-evaluation-harness",
    "python -m eval.compare": "compares the results of several runs",
    "python -m eval.longppl": "perplexity of a run on what needs a long context, by a judge model",
    "python -m eval.probes": "pictures of recall, states and attention of a run",
    "python -m launch.sweep": "trains a sweep",
    "python -m launch.report": "makes a sweep's report",
}
HERE, ROOMS = "python -m hybridlm", "rooms"
_entry = ""


def module(command: str) -> str:
    """python -m eval.compare -> eval.compare; python train.py -> train"""
    return command.split()[-1].removesuffix(".py")


def typed(command: str) -> str:
    """``command`` as it is typed here: only a clone has names beside hybridlm's own."""
    return f"{HERE} {module(command)}" if root().name == ROOMS and HERE not in command else command


def listing() -> str:
    said = {typed(command): about for command, about in COMMANDS.items()}
    width = max(map(len, said))
    return "\n".join(f"  {command:{width}}  {about}" for command, about in said.items())


def named(argv: Sequence[str]) -> None:
    """Runs the command whose module is ``argv[0]`` with the rest; the list of all, and code 2, without."""
    known = [module(command) for command in COMMANDS]
    if argv[:1] in (["--help"], ["-h"]):
        print(f"{HERE} COMMAND ... runs one from anywhere. Commands, each with --help:\n{listing()}")
        sys.exit(0)
    if not argv or argv[0] not in known:
        said = f"{argv[0]} is no command." if argv else f"{HERE} COMMAND ... runs one from anywhere."
        print(f"{said} Commands, each with --help:\n{listing()}", file=sys.stderr)
        sys.exit(2)
    sys.argv = list(argv)
    _run(f"{HERE} {argv[0]}", argv[0])


def refuse_others() -> None:
    """Ends a `python -m hybridlm.pattern`, which would do nothing, with the list of commands and code 2.

    Python imports the package before the module that it was asked for, and names it in ``orig_argv`` only.
    """
    if sys.argv[:1] != ["-m"]:
        return
    asked = sys.orig_argv[1 + next((i for i, one in enumerate(sys.orig_argv) if one[-1:] == "m"), -1)]
    if asked.partition(".")[0] != "hybridlm" or f"python -m {asked}" in (HERE, *COMMANDS):
        return
    print(f"{asked} is no command. Commands, each with --help:\n{listing()}", file=sys.stderr)
    sys.exit(2)


def root() -> Path:
    """Where train.py, configs, eval and launch are: the clone, or in a wheel a folder of this package."""
    here = Path(__file__).parent
    return here.parent if (here.parent / "train.py").is_file() else here / ROOMS


def called(command: str) -> str:
    """What was typed in place of ``command``, for its --help: the name of an entry point, or itself."""
    return _entry or command


def _run(entry: str, module: str) -> None:
    """``python -m module`` from anywhere: this process and its children find what is in `root` first."""
    global _entry
    _entry = entry
    sys.path.insert(0, str(root()))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root()), os.environ.get("PYTHONPATH")]))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


train, evaluate = partial(_run, "hybridlm-train", "train"), partial(_run, "hybridlm-eval", "eval")
sweep = partial(_run, "hybridlm-sweep", "launch.sweep")
generate = partial(_run, "hybridlm-generate", "hybridlm.generate")
convert = partial(_run, "hybridlm-convert", "hybridlm.convert")
prepare = partial(_run, "hybridlm-prepare", "hybridlm.data.prepare")
