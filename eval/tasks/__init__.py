"""Every task by name, and suites of them. A family of tasks is a file; TASKS lists them all."""

from collections.abc import Iterable

from eval.tasks import labelled, latent_match, natural, passkey, phonebook, ruler, ruler_qa, sessions
from eval.tasks.base import Setting, Task
from hybridlm import commands
from hybridlm.errors import ConfigError, nearest, one_of

__all__ = ["SUITES", "TASKS", "Setting", "Task", "choose"]

TASKS: dict[str, Task] = {
    task.name: task
    for family in (passkey, ruler, ruler_qa, phonebook, latent_match, sessions, natural, labelled)
    for task in family.TASKS
}

SUITES: dict[str, tuple[str, ...]] = {
    "recall": tuple(task.name for family in (passkey, ruler) for task in family.TASKS),
    "ruler": (*(task.name for task in ruler.TASKS), "qa_1", "qa_2"),
    "prose": tuple(task.name for family in (phonebook, latent_match) for task in family.TASKS),
    "sessions": tuple(task.name for task in sessions.TASKS),
    "natural": tuple(task.name for task in natural.TASKS),
    "synthetic": tuple(task.name for task in labelled.TASKS),
}


def choose(suite: str, names: Iterable[str]) -> list[Task]:
    """The tasks of ``suite`` ("" for none) and those called ``names``, each once; ConfigError if unknown."""
    if suite:
        one_of("--suite", suite, SUITES)
    chosen = list(SUITES.get(suite, ()))
    for name in names:
        if name not in TASKS:
            fix = f"{nearest(name, TASKS)} `{commands.typed('python -m eval')} --list` describes them all."
            raise ConfigError("--tasks", name, "there is no such task", fix)
        chosen.append(name)
    if not chosen:
        raise ConfigError("--suite", suite, "no task is chosen", f"Suites: {', '.join(SUITES)}.")
    return [TASKS[name] for name in dict.fromkeys(chosen)]
