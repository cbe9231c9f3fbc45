import json
from collections import Counter

import pytest

from hybridlm.data import bpe, tokenizer
from hybridlm.errors import ConfigError

TEXTS = ["the cat and the hat and the bat", "then there was the rest, naïve ☃\n\tthe end"] * 3


def trained(path, vocab_size, texts=TEXTS):
    bpe.train((text.encode() for text in texts), vocab_size, path)
    return tokenizer.load(str(path))


def test_the_first_merge_is_the_most_frequent_pair_within_words(tmp_path):
    file = trained(tmp_path / "t.json", 258)
    pairs = Counter()
    for text in TEXTS:
        for word in text.replace(" ", "\0 ").split("\0"):
            content = word.encode()
            pairs.update(content[i : i + 2] for i in range(len(content) - 1))
    [merge] = json.loads((tmp_path / "t.json").read_text())["model"]["merges"]
    assert pairs[file.pieces[257]] == max(pairs.values()) and "".join(merge).encode() == file.pieces[257]


def test_every_text_is_read_back_and_the_separator_is_no_text(tmp_path):
    file = trained(tmp_path / "t.json", 280)
    assert (file.vocab_size, file.doc_id, file.pieces[0]) == (280, 0, b"")
    for text in [*TEXTS, "жаба <doc> \x00\r\n  \U0001f600", ""]:
        assert file.decode(file.encode(text)) == text and file.doc_id not in file.encode(text)
    assert sorted(piece for piece in file.pieces if len(piece) == 1) == [bytes([i]) for i in range(256)]


def test_no_more_text_is_counted_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "MAX_BYTES", 50)
    read = []

    def documents():
        for i in range(100):
            read.append(i)
            yield b"abcd abcd abcd abcd "

    bpe.train(documents(), 259, tmp_path / "t.json")
    assert read == [0, 1, 2]


@pytest.mark.parametrize("vocab_size", [0, 257, 1 << 25])
def test_impossible_sizes_are_refused(tmp_path, vocab_size):
    with pytest.raises(ConfigError, match="must be more than 257"):
        trained(tmp_path / "t.json", vocab_size)
    with pytest.raises(ConfigError, match=r"is more than the \d+ ids that this text gives"):
        trained(tmp_path / "t.json", 5000)
