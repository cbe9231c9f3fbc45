"""What a row of copied digits holds, and that its measure is 0 for a copier and 4 bits for a guesser."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import copy_recall
from hybridlm.data import tokenizer


def subject(log_likelihood):
    tokens = tokenizer.load("bytes")
    return SimpleNamespace(
        text_tokenizer=tokens,
        encode=lambda text: [tokens.doc_id, *tokens.encode(text)],
        log_likelihoods=lambda pairs: [log_likelihood(*map(bytes, (c[1:], d))) for c, d in pairs],
    )


def copies(context: bytes, digits: bytes) -> tuple[float, bool]:
    """Of a model that goes on as the text did where the last 16 bytes stood before; else it guesses."""
    place = context[:-16].find(context[-16:])
    known = place >= 0 and context[place + 16 : place + 64] == digits
    return (0.0, True) if known else (-48 * np.log(16), False)


TEXT = "".join(f"def f{i}(x):\treturn x * {i} + {7 * i} # {i:x} twice\t" for i in range(999))


@pytest.mark.parametrize("text", ["", TEXT])
@pytest.mark.parametrize("length, lines", [(512, 1), (1024, 8)])
def test_rows(length, lines, text):
    made = copy_recall.pairs(subject(copies), length, lines, 4, text)
    assert len({tuple(digits) for _, digits in made}) == 4
    for context, digits in made:
        whole = bytes(context[1:])
        assert length - 16 <= len(context) + len(digits) <= length
        assert all(len(line) == 64 for line in whole.split(b"\n")[:lines])
        assert sum(line.endswith(bytes(digits)) for line in whole.split(b"\n")[:lines]) == 1


@pytest.mark.parametrize("text", ["", TEXT])
def test_the_same_rows_without_what_is_asked_for(text):
    """End, length and what fills the row are equal; the line is nowhere."""
    seen, unseen = (copy_recall.pairs(subject(copies), 512, 2, 4, text, one) for one in (True, False))
    for (context, digits), (other, same) in zip(seen, unseen, strict=True):
        assert digits == same and len(context) == len(other) and context[-300:] == other[-300:]
        assert bytes(digits) in bytes(context[1:]) and bytes(digits) not in bytes(other[1:])


def test_source(tmp_path):
    (tmp_path / "val.jsonl").write_text('{"text": "caf\\u00e9"}\n{"text": "b"}\n')
    assert copy_recall.read(str(tmp_path / "val.jsonl")) == "caf\nb"


def test_measure():
    right = copy_recall.measure(subject(copies), 512, 1, 5)
    assert right["bits"] == 0 and right["exact"] == 1 and right["saved"] == pytest.approx(4)
    wrong = copy_recall.measure(subject(lambda context, digits: copies(context[200:], digits)), 512, 1, 5)
    assert wrong["bits"] == pytest.approx(4) and wrong["exact"] == 0 and wrong["half"] == 0
    assert wrong["saved"] == 0
