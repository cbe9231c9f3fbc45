"""LongPPL against its definition, with a judge whose probabilities are known, and through the command."""

import json
import math

import numpy as np
import pytest

from eval import longppl
from hybridlm.errors import RunError
from tests.test_eval import workdir  # noqa: F401  # a fixture

CONTEXT, STRIDE = 8, 4


class Judge:
    """Knows a token well if it stood among those that it sees, else gives it 1 / 20."""

    def __init__(self, seen: float = 0.9):
        self.seen, self.longest = seen, 0

    def rows_per_batch(self, length):
        return 3

    def token_scores(self, batch):
        tokens, targets = batch["tokens"], batch["targets"]
        self.longest = max(self.longest, tokens.shape[1])
        known = np.array([[targets[b, t] in tokens[b, : t + 1] for t in range(tokens.shape[1])]
                          for b in range(len(tokens))])  # fmt: skip
        return np.log(np.where(known, self.seen, 0.05)), None


def test_key_tokens_are_those_that_only_the_long_context_knows():
    rng = np.random.default_rng(0)
    texts = rng.integers(40, size=(5, 31)).astype(np.int32)
    keys = longppl.key_tokens(Judge(), texts, CONTEXT, STRIDE)
    for text, found in zip(texts.tolist(), keys, strict=True):
        for i in range(1, len(text)):
            start = (i - CONTEXT) // STRIDE * STRIDE  # of the short context, which all of a stride share
            want = i >= CONTEXT and text[i] in text[:i] and text[i] not in text[start:i]
            assert found[i - 1] == want, i
    assert 0 < keys.sum() < keys.size / 2 and not keys[:, : CONTEXT - 1].any()
    judge, model = Judge(), Judge(0.5)
    found = longppl.score(model, judge, texts, CONTEXT, STRIDE)
    assert found.perplexity == pytest.approx(2.0) and (found.low, found.high) == pytest.approx((2.0, 2.0))
    assert judge.longest == 30 and found.keys == keys.sum() and found.tokens == 5 * (31 - CONTEXT)
    late = [math.log(0.5 if text[i] in text[:i] else 0.05) for text in texts.tolist() for i in range(8, 31)]
    assert found.plain == pytest.approx(math.exp(-np.mean(late)))
    with pytest.raises(RunError, match="no key token"):
        longppl.score(model, Judge(0.1), texts, CONTEXT, STRIDE)


def test_windows_cover_each_token_once():
    covered = [i for begin, end in longppl.windows(31, CONTEXT, STRIDE) for i in range(begin, end)]
    assert covered == list(range(CONTEXT, 31))


def test_command(workdir, tmp_path, capsys):  # noqa: F811
    (tmp_path / "a.txt").write_text("state gate decay " * 40)
    run = lambda *flags: longppl.main([f"--workdir={workdir}", f"--judge={workdir}", *flags])
    sizes = ("--length=95", "--context=47", "--stride=48", f"--text={tmp_path}/*.txt")
    status = run(*sizes)
    shown = capsys.readouterr()
    if status:  # fresh parameters need not have a key token
        assert status == 1 and "finds no key token" in shown.err
    else:
        assert "LongPPL" in shown.out and json.loads((workdir / "longppl.json").read_text())["length"] == 95
    for flags, said in ((("--length=9",), "must be above --context"), (("--stride=0",), "at least 1"),
                        (("--length=9000", *sizes[1:]), "holds no file of 9000 tokens")):  # fmt: skip
        assert run(*flags) == 2
        assert said in capsys.readouterr().err
