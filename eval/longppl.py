"""Perplexity on the tokens that need a long context.

    python -m eval.longppl --workdir=runs/x --judge=runs/full --length=8192

Fang et al. 2024, "What is Wrong with Perplexity for Long-context Language Modeling?" (arXiv 2410.23771). A
judge finds the key tokens: those that it predicts better by more than 2 nats from all that stood before than
from the last ``context`` to ``context`` + ``stride`` - 1 tokens, and that it gives more than exp(-2). LongPPL
is the perplexity of the evaluated model on them. One judge for all models that are compared: a sibling with
full attention, say, trained on the same data at the length. Judge and model must share their tokenizer; the
paper matches spans of characters where they do not.

Writes longppl.json into the workdir. A text is a sample: the interval resamples texts.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval import runner, subject
from eval.subject import Subject
from hybridlm import commands, untrusted
from hybridlm.data import documents, files
from hybridlm.errors import ConfigError, RunError
from hybridlm.run import cli, private

GAIN, KNOWN = 2.0, -2.0  # nats: what the long context must add, and what the judge must reach with it
RESAMPLES = 2000


class Score(NamedTuple):
    """perplexity: on the key tokens; low, high: its 95% interval over texts.  plain: on all tokens from
    ``context`` on.  keys: how many, of ``tokens``.
    """

    perplexity: float
    low: float
    high: float
    plain: float
    keys: int
    tokens: int
    texts: int


def texts(patterns: str, tested: Subject, length: int) -> np.ndarray:
    """[N, length + 1]: documents, the separator before them, that have as many tokens, cut there."""
    found = []
    for file in files.find(patterns, "--text"):
        content = documents.whole(file, "--text").decode(errors="replace")
        tokens = tested.encode(content)
        if len(tokens) > length:
            found.append(tokens[: length + 1])
    if not found:
        allowed = f"holds no file of {length} tokens or more"
        raise ConfigError("--text", patterns, allowed, "Give longer texts, or a smaller --length.")
    return np.array(found, np.int32)


def log_probs(tested: Subject, rows_NT: np.ndarray) -> np.ndarray:
    """log P of each token but the first from those before it in its row, [N, T - 1]."""
    tokens_NT, targets_NT = rows_NT[:, :-1], rows_NT[:, 1:]
    count, length = tokens_NT.shape
    size = min(tested.rows_per_batch(length), count)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (size, length))
    parts = []
    for start in range(0, count, size):
        chosen = np.minimum(np.arange(start, start + size), count - 1)  # the last batch is filled up
        batch = {"tokens": tokens_NT[chosen], "targets": targets_NT[chosen], "positions": positions,
                 "segment_ids": np.ones_like(positions)}  # fmt: skip
        parts.append(tested.token_scores(batch)[0])
    return np.concatenate(parts)[:count].astype(np.float64)


def key_tokens(judge: Subject, texts_NT: np.ndarray, context: int, stride: int) -> np.ndarray:
    """Whether token 1 + j of a text is a key, bool [N, T - 1]; none before ``context``."""
    whole = log_probs(judge, texts_NT)
    short = np.full_like(whole, np.inf)
    for begin, end in windows(texts_NT.shape[1], context, stride):
        near = log_probs(judge, texts_NT[:, begin - context : end])
        short[:, begin - 1 : end - 1] = near[:, context - 1 :]
    return (whole - short > GAIN) & (whole > KNOWN)


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of the tokens that are predicted from ``context`` tokens before the first of them."""
    for begin in range(context, length, stride):
        yield begin, min(begin + stride, length)


def score(tested: Subject, judge: Subject, texts_NT: np.ndarray, context: int, stride: int) -> Score:
    keys = key_tokens(judge, texts_NT, context, stride)
    log_prob = log_probs(tested, texts_NT)
    sums, counts = (np.where(keys, log_prob, 0).sum(axis=1), keys.sum(axis=1))
    if not counts.sum():
        size = f"{len(texts_NT)} texts of {texts_NT.shape[1] - 1} tokens"
        raise RunError(f"the judge finds no key token in {size}: take a better one, or longer texts.")
    drawn = np.random.default_rng(0).integers(len(counts), size=(RESAMPLES, len(counts)))
    with np.errstate(invalid="ignore"):
        means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.nanquantile(np.exp(-means), [0.025, 0.975]) if len(counts) > 1 else (math.nan, math.nan)
    late = log_prob[:, context - 1 :]
    total = math.exp(-sums.sum() / counts.sum())
    plain = math.exp(-late.mean())
    return Score(total, float(low), float(high), plain, int(counts.sum()), late.size, len(counts))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=commands.called("python -m eval.longppl"), description=__doc__, formatter_class=raw
    )
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="of the run that is evaluated")
    add("--judge", required=True, metavar="DIR", help="of the run that finds the key tokens")
    add("--text", default=files.STDLIB, metavar="GLOB,...", help="texts (default: %(default)s)")
    add("--length", type=int, default=8192, help="tokens of a text (default: %(default)s)")
    add("--context", type=int, default=4096, help="of the short context (default: %(default)s)")
    add(
        "--stride",
        type=int,
        default=1024,
        help="tokens predicted from one short context (default: %(default)s)",
    )
    add("--samples", type=int, default=50, help="texts at most (default: %(default)s)")
    add("--tokenizer", default="", metavar="FILE", help="of both; default: the runs' own")
    add("--batch_tokens", type=int, default=1 << 15, help="tokens of a batch (default: %(default)s)")
    return parser.parse_args(argv)


def evaluate(flags: argparse.Namespace) -> None:
    for name in ("context", "stride", "samples", "batch_tokens"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name}", getattr(flags, name), "must be at least 1")
    if flags.length <= flags.context:
        raise ConfigError("--length", flags.length, f"must be above --context = {flags.context}")
    load = partial(subject.load, tokenizer=flags.tokenizer, batch_tokens=flags.batch_tokens)
    tested, judge = load(flags.workdir), load(flags.judge)
    if tested.text_tokenizer.fingerprint != judge.text_tokenizer.fingerprint:
        allowed = f"has the tokenizer {judge.text_tokenizer.name}, the run {tested.text_tokenizer.name}"
        raise ConfigError("--judge", flags.judge, allowed, "Judge and run must share it.")
    runner.check_writable(Path(flags.workdir))
    chosen = texts(flags.text, tested, flags.length)[: flags.samples]
    found = score(tested, judge, chosen, flags.context, flags.stride)
    settings = {name: getattr(flags, name) for name in ("length", "context", "stride")}
    judged = {"judge": Path(private.hide(str(Path(flags.judge).resolve()))).name, "judge_step": judge.step}
    numbers: dict[str, Any] = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                               for k, v in found._asdict().items()}  # fmt: skip
    path = Path(flags.workdir) / "longppl.json"
    about = {"step": tested.step, "text": private.hide(flags.text), **judged, **settings}
    runner.put(path, lambda: untrusted.write_json(path, {**about, **numbers}))
    share = f"{found.keys:,} key tokens ({found.keys / found.tokens:.2%} of {found.tokens:,})"
    interval = f"[{found.low:.3f}, {found.high:.3f}]"
    print(f"LongPPL {found.perplexity:.3f} {interval} on {share} of {found.texts} texts")
    print(f"perplexity {found.plain:.3f} on all of them")


def main(argv: Sequence[str]) -> int:
    flags = parse(argv)
    return cli.run(lambda: evaluate(flags))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
