"""What all cluster engines share: settings from the command line, and the command of a run."""

import dataclasses
import hashlib
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlm import fields, untrusted
from hybridlm.errors import ConfigError, RunError, nearest
from launch.grid import Run
from launch.local import Job


def settings(engine: type, given: Sequence[str]) -> Any:
    """The Settings ``engine`` from KEY=VALUE texts. ConfigError for an unknown key or a wrong value."""
    known = fields.fields(engine)
    values = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            allowed = "must be KEY=VALUE with a setting of the launcher"
            raise ConfigError("--engine", text, allowed, nearest(key, known))
        values[key] = fields.checked(f"--engine {key}", known[key], value, fields.parse)
    for field in dataclasses.fields(engine):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise ConfigError(f"--engine {field.name}", "", "must be given", f"--engine {field.name}=...")
    return engine(**values)


def script(commands: Sequence[Sequence[str]]) -> str:
    """A bash script of ``commands``, which ends at the first that fails."""
    return "#!/bin/bash\nset -e\n" + "".join(untrusted.shell(words) + "\n" for words in commands)


def plain(text: str) -> str:
    """``text`` as a name that no tool reads anything into."""
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip("-") or "sweep"


def without_clone() -> str:
    """Why job files that start train.py beside them lead nowhere from here; "" if they do."""
    if Path("train.py").is_file():
        return ""
    return "there is no train.py here: the jobs start that of a clone, so sweep from one"


def runs(jobs: Sequence[Job]) -> list[Run]:
    """One by one, for engines that start train.py."""
    return [run for job in jobs for run in job.runs]


def kubernetes_name(text: str, length: int) -> str:
    """``text`` in small letters, digits and hyphens; what is too long ends in a hash instead."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if name[:1].isdigit():
        name = f"run-{name}"
    if len(name) <= length:
        return name
    return f"{name[: length - 7]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def call(words: Sequence[str], what: str, wanted: str = "") -> str:
    """What a client says; RunError, with its last line, if it fails at ``what`` or says no ``wanted``."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    found = re.search(wanted, said)
    if done.returncode or not found:
        lines = [line.strip() for line in (done.stderr or said).splitlines() if line.strip()]
        last = untrusted.terminal((lines or ["it said nothing"])[-1])
        raise RunError(f"{words[0]} refused {what}: {last}")
    return found[found.lastindex or 0]


def write(path: Path, text: str, executable: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    untrusted.write_text(path, text)
    if executable:
        path.chmod(0o755)
    return path
