import os
import sysconfig
from pathlib import Path

import pytest

from hybridlm.data import files
from hybridlm.errors import ConfigError


@pytest.fixture
def tree(tmp_path):
    for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt", "sub/d.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def keys(patterns):
    return [file.key for file in files.find(patterns, "path")]


def test_globs_give_keys_below_their_fixed_part(tree, monkeypatch):
    assert keys(f"{tree}/**/*.txt") == ["a.txt", "sub/b.txt", "sub/deep/c.txt"]
    assert keys(f"{tree}/sub/*.txt") == ["b.txt"]
    assert keys(f"{tree}/sub/*.txt, {tree}/a.txt,{tree}/**/*.txt") == ["b.txt", "a.txt", "sub/deep/c.txt"]
    monkeypatch.chdir(tree)
    assert keys("**/*.txt") == ["a.txt", "sub/b.txt", "sub/deep/c.txt"]
    assert keys("sub/../a.txt") == ["a.txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none.txt", "does not exist"),
        ("*.none", "matches no file"),
        ("sub", "is a directory"),
        ("", "must be a path"),
    ],
)
def test_nothing_found_is_refused(tree, pattern, message):
    with pytest.raises(ConfigError, match=message) as error:
        files.find(f"{tree}/{pattern}" if pattern else "", "val_path")
    assert error.value.field == "val_path"


def test_stdlib_is_python_text_without_tests():
    found = files.find(files.STDLIB, "path")
    names = [file.key for file in found]
    assert len(names) > 300 and names == sorted(set(names))
    assert {"ast.py", "asyncio/base_events.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    root = Path(sysconfig.get_paths()["stdlib"])
    assert all(Path(file.path) == root / file.key for file in found)


def test_commas_and_brackets_in_names_are_names(tmp_path):
    for name in (
        "a,b.txt",
        "x [1]/c.txt",
        "x [1]/d[2].txt",
        "p,q/e.txt",
        "p,q/f.txt",
        "x1/g.txt",
        "a,b,c/h.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert keys(f"{tmp_path}/a,b.txt") == ["a,b.txt"]
    assert keys(f"{tmp_path}/x [1]/*.txt") == ["c.txt", "d[2].txt"]
    assert keys(f"{tmp_path}/x [1]/d[2].txt") == ["d[2].txt"]
    assert keys(f"{tmp_path}/p,q/*.txt") == ["e.txt", "f.txt"]
    assert keys(f"{tmp_path}/p,q/*.txt, {tmp_path}/a,b.txt,{tmp_path}/a,b,c/**/*.txt") == [
        "e.txt", "f.txt", "a,b.txt", "h.txt",
    ]  # fmt: skip
    assert keys(f"{tmp_path}/x[1]/*.txt") == ["x1/g.txt"]  # still a glob where no name is meant


def test_the_real_cause_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"b.txt.*does not exist.*Commas separate"):
        files.find(f"{tmp_path}/a.txt,b.txt", "path")
    with pytest.raises(ConfigError, match=r"matches no file.*Brackets stand for one"):
        files.find(f"{tmp_path}/r[1].txt", "path")
    with pytest.raises(ConfigError, match=r"does not exist. '.*a.txt' is a file"):
        files.find(f"{tmp_path}/a.txt/b.txt", "path")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is a pipe, not a file"):
        files.find(f"{tmp_path}/pipe", "path")
    with pytest.raises(ConfigError, match="NUL"):
        files.find("a\0b", "path")
