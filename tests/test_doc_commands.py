"""Every command that the README and docs name can be typed: its module and flags exist, its config resolves.

What the commands do is tested where their modules are.
"""

import argparse
import importlib.util
import inspect
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

import train
from hybridlm import commands
from hybridlm import config as configs

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = {"ruff", "mypy", "pre-commit", "sphinx-build"}  # of extras; `.ci/run` and sphinx run them
TAUGHT = {"simple_gla", "my_mixers:MovingAverage"}  # kinds that a guide makes: tests/test_contributing.py


class Parsed(Exception):
    """A command line was read, and the command goes no further."""


def lines(page: Path) -> list[tuple[str, bool]]:
    """Commands of a page: of its blocks of bash (True), and in its running text between backticks."""
    text = page.read_text()
    found: list[str] = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        block = block.replace("\\\n", " ")
        names = dict(re.findall(r'^(\w+)="([^"]*)"$', block, re.MULTILINE))
        for name, value in names.items():
            block = re.sub(rf'^{name}="[^"]*"$', "", block, flags=re.MULTILINE)
            block = block.replace(f"${name}", " ".join(value.split()))
        found += block.splitlines()
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    programs = r"(\w+=\S* )*((\.venv/bin/)?python |pytest |pip install|sphinx-build|hybridlm-)"
    return [(line, True) for line in found] + [(span, False) for span in spans if re.match(programs, span)]


COMMANDS = sorted(
    {
        (" ".join(part.split()), whole)
        for page in PAGES
        for line, whole in lines(page)
        for part in re.sub(r"(^|\s)#.*", "", line).split(" && ")
        if part.strip() and not part.startswith("export ")
    }
)


def test_they_are_found():
    assert len(COMMANDS) > 50 and all(any(one in c for c, _ in COMMANDS) for one in commands.COMMANDS)


@pytest.mark.parametrize(("command", "whole"), COMMANDS)
def test_command(command, whole, monkeypatch):
    """whole: all that it needs is there, as in a block; a mention may leave it out."""
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    words[0] = words[0].removeprefix(".venv/bin/").removesuffix("3")
    if words[:3] == ["python", "-m", "hybridlm"] and len(words) > 3:
        del words[2]  # any command, by its module: tests/test_commands.py
    match words:
        case ["python", "-m", "venv", _]:
            pass
        case ["python", "-m", "pytest", *options] | ["pytest", *options]:
            assert all((ROOT / one).exists() for one in options if one.startswith("tests"))
        case ["python", "-m", "hybridlm"]:
            pass  # the list of commands: tests/test_commands.py
        case ["python", "-m", name, *arguments]:
            module = f"{name}.__main__" if (ROOT / name.replace(".", "/")).is_dir() else name
            typed(module, arguments, whole, monkeypatch)
        case ["python", script, *arguments]:
            assert (ROOT / script).is_file()
            monkeypatch.syspath_prepend(str((ROOT / script).parent))  # as Python does
            typed(script.removesuffix(".py").replace("/", "."), arguments, whole, monkeypatch)
        case ["pip", "install", *what]:
            extra = re.search(r"\[(.*)\]", what[-1])
            assert extra is None or extra[1] in PROJECT["optional-dependencies"]
        case [".ci/run"]:
            assert (ROOT / ".ci/run").is_file()
        case [program, *_]:
            assert program in PROGRAMS | set(PROJECT["scripts"])


def typed(module: str, arguments: list[str], whole: bool, monkeypatch) -> None:
    """The command line is one that ``module`` reads."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    if "argv" not in Path(spec.origin).read_text() and not arguments:
        return  # reads none
    read = argparse.ArgumentParser.parse_known_args

    def stop(self, args=None, namespace=None, **options):
        rest = read(self, args, namespace, **options)[1]
        assert all(one.startswith("--config.") for one in rest)
        raise Parsed

    def error(self, message):
        raise Parsed if "are required" in message and not whole else AssertionError(message)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "error", error)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        main = importlib.import_module(module).main
    except ImportError as error:
        if "for kernels install" not in str(error):
            raise
        pytest.skip(str(error))  # a benchmark of kernels that this jax cannot make
    with pytest.raises(Parsed):
        main(*[arguments] * bool(inspect.signature(main).parameters))
    monkeypatch.undo()
    named = next((a.removeprefix("--config=") for a in arguments if a.startswith("--config=")), "")
    if named.startswith("configs/"):
        assert Path(ROOT / named.partition(":")[0]).is_file()
    there = named.startswith("configs/") and ":teacher=" not in named  # a config that reads no run
    if module == "train" and there and not TAUGHT & kinds(arguments):
        monkeypatch.chdir(ROOT)
        flags, overrides = train.parse(arguments)
        configs.resolve(configs.load(flags.config, overrides))


def kinds(arguments: list[str]) -> set[str]:
    return {a.partition(".kind=")[2] for a in arguments}
