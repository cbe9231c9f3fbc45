"""One way in and one way out: nobody but `hybridlm.untrusted` writes small files or reads others' JSON."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLD = re.compile(r"\.write_text\(|\.write_bytes\(|\bjson\.loads?\(|\bshlex\.quote\(")
GUARD = re.compile(r"^\s*assert (?!isinstance\(|.* is not None)", re.MULTILINE)  # those are for mypy
ALLOWED = {
    "hybridlm/data/documents.py": "a line of JSONL may be as odd as its user likes; it is checked there",
    "hybridlm/data/formats.py": "the same",
}
ELSEWHERE = ("hybridlm/convert/", "eval/")  # have their own tests of what they read


def files():
    for room in ("hybridlm", "launch"):
        for path in sorted((ROOT / room).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name != "hybridlm/untrusted.py" and not name.startswith(ELSEWHERE):
                yield name


@pytest.mark.parametrize("name", list(files()))
def test_no_old_way(name):
    text = (
        (ROOT / name).read_text().replace("untrusted.write_text(", "").replace("untrusted.write_bytes(", "")
    )
    found = [text[: match.start()].count("\n") + 1 for old in (OLD, GUARD) for match in old.finditer(text)]
    assert not found or name in ALLOWED, f"{name}: lines {found}: use hybridlm.untrusted, or raise an error"
