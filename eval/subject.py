"""The model under test: text in, text or probabilities out, in batches of few shapes."""

import dataclasses
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from eval import shared
from hybridlm import cost, generate, loss, weights
from hybridlm import model as lm
from hybridlm.config import Config
from hybridlm.data import tokenizer as tokenizers
from hybridlm.data.source import empty_rows
from hybridlm.errors import ConfigError
from hybridlm.generate import decoding
from hybridlm.rows import Rows
from hybridlm.run import seal

log = logging.getLogger("hybridlm")
SHOWN = 64  # tokens before a text that can have a part in how it is spelt
Progress = Callable[[int], None]  # called with the number of samples done since the last call


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, its parameters and its tokenizer.

    tokenizer: None when its tokens stand for no text.
    config: the resolved config of the run; its data, for tasks that the model was trained on.
    step: of the checkpoint.
    batch_tokens: tokens of a batch at most, padding included; one row is a batch however long it is.
    checkpoint: which of those that a step may have had (`seal.identity`).
    """

    definition: lm.Definition
    params: lm.Params
    tokenizer: tokenizers.Tokenizer | None
    config: Config
    step: int
    batch_tokens: int = 1 << 15
    checkpoint: str = ""

    def kept_bytes(self, length: int) -> int:
        return cost.kept_bytes(self.definition, length)

    def encode(self, text: str) -> list[int]:
        """A document that begins with ``text``: the separator and its tokens."""
        tokens = self.text_tokenizer
        return [tokens.doc_id, *tokens.encode(text)]

    @property
    def text_tokenizer(self) -> tokenizers.Tokenizer:
        if self.tokenizer is None:
            fix = "Give --tokenizer, or choose tasks that need no text: --suite=synthetic."
            raise ConfigError("--tasks", self.config.data.kind, "the model's tokens stand for no text", fix)
        return self.tokenizer

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        sampling: generate.Sampling = generate.GREEDY,
        seed: int = 0,
        progress: Progress = lambda done: None,
    ) -> list[str]:
        """A text for each prompt (token ids), in their order.

        What is drawn for a prompt depends on ``seed``, its tokens and how often it came before, so repeats
        differ, and neither batches nor what else is asked make a difference.
        """
        texts: list[str] = [""] * len(prompts)
        numbers = sample_numbers(prompts)
        for chosen, filled in self._batches([len(p) for p in prompts], max_new_tokens):
            made = generate.complete(
                self.definition, self.params, self.text_tokenizer, [prompts[i] for i in filled],
                max_new_tokens=max_new_tokens, stop=stop, sampling=sampling, seed=seed,
                samples=[numbers[i] for i in filled],
            )  # fmt: skip
            for index, text in zip(chosen, made[: len(chosen)], strict=True):
                texts[index] = text
            progress(len(chosen))
        return texts

    def answer(
        self,
        contexts: Sequence[Sequence[int]],
        questions: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        progress: Progress = lambda done: None,
    ) -> list[str]:
        """A greedy text behind each question (token ids, at least one), which stands behind its context.

        A context that several questions share is read once, and its cache copied for each (`eval.shared`).
        """
        tokens, marks = self.text_tokenizer, np.zeros(self.definition.vocab_size, bool)
        marks[decoding.stop_tokens(tokens, stop)] = True
        texts: list[str] = [""] * len(questions)
        budget = shared.pad(max_new_tokens)
        groups = shared.grouped(contexts)
        for members, batch in shared.batches(groups, questions, budget, self.batch_tokens):
            out = np.asarray(
                shared.written(
                    self.params, batch, jnp.int32(max_new_tokens), jnp.asarray(marks),
                    definition=self.definition, budget=budget,
                )
            )  # fmt: skip
            for row, index in enumerate(members):
                before = [*contexts[index], *questions[index]][-SHOWN:]
                texts[index] = decoding.written(tokens, before, out[row].tolist(), stop)
            progress(len(members))
        return texts

    def log_likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], progress: Progress = lambda done: None
    ) -> list[tuple[float, bool]]:
        """For (context, continuation), token ids: log P(continuation | context) in nats, and whether each of
        its tokens is the most probable one. Contexts hold at least one token; one that several pairs have,
        and that is longer than what follows it, is read once for all of them.
        """
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        following = [continuation for _, continuation in pairs]
        longer = lambda group: len(group.context) > max(len(following[i]) for i in group.members)
        groups = shared.grouped([context for context, _ in pairs])
        together = [group for group in groups if len(group.members) > 1 and longer(group)]
        for members, batch in shared.batches(together, following, 0, self.batch_tokens):
            log_prob, correct = map(np.asarray, shared.scores(self.params, batch, self.definition))
            for row, index in enumerate(members):
                count = len(following[index])
                total = float(log_prob[row, :count].sum(dtype=np.float64))
                results[index] = total, bool(correct[row, :count].all())
            progress(len(members))
        taken = {index for group in together for index in group.members}
        alone = [index for index in range(len(pairs)) if index not in taken]
        for index, result in zip(alone, self._each([pairs[i] for i in alone], progress), strict=True):
            results[index] = result
        return results

    def _each(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], progress: Progress
    ) -> list[tuple[float, bool]]:
        """`log_likelihoods`, each pair a row of its own."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        lengths = [len(context) + len(continuation) - 1 for context, continuation in pairs]
        for chosen, filled in self._batches(lengths, 0):
            batch = empty_rows(len(filled), generate.bucket(max(lengths[i] for i in chosen)))
            batch["positions"][:] = np.arange(batch["positions"].shape[1])
            for row, index in enumerate(filled):
                context, continuation = pairs[index]
                end = lengths[index]
                batch["tokens"][row, :end] = [*context, *continuation][:-1]
                batch["segment_ids"][row, :end] = 1
                batch["targets"][row, len(context) - 1 : end] = continuation
            log_prob, correct = self.token_scores(batch)
            for row, index in enumerate(chosen):
                counted = batch["targets"][row] >= 0
                results[index] = float(log_prob[row].sum(dtype=np.float64)), bool(correct[row][counted].all())
            progress(len(chosen))
        return results

    def token_scores(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(log probability of each target, whether it is the most probable), [B, T]; see `loss.per_token`."""
        scores = _token_scores(self.params, {k: jnp.asarray(v) for k, v in batch.items()}, self.definition)
        return tuple(np.asarray(x) for x in scores)  # type: ignore[return-value]

    def rows_per_batch(self, length: int) -> int:
        return max(1, self.batch_tokens // length)

    def _batches(self, lengths: Sequence[int], extra: int) -> Iterator[tuple[list[int], list[int]]]:
        """(indices of a batch, the same filled up to the batch's full size), longest first.

        Rows of a batch share a bucket of lengths, and all batches of a bucket have one size, so that one
        program is compiled for each. Longest first, so that memory that lacks is missed at once.
        """
        buckets: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            buckets.setdefault(generate.bucket(length), []).append(index)
        for length in sorted(buckets, reverse=True):
            rows = min(self.rows_per_batch(length + extra), 1 << (len(buckets[length]) - 1).bit_length())
            for start in range(0, len(buckets[length]), rows):
                chosen = buckets[length][start : start + rows]
                yield chosen, chosen + chosen[:1] * (rows - len(chosen))


def sample_numbers(prompts: Sequence[Sequence[int]]) -> list[int]:
    """A number below 2^31 for each of ``prompts``: of its tokens and of how many equal ones came before."""
    seen: Counter[bytes] = Counter()
    numbers = []
    for prompt in prompts:
        key = np.asarray(prompt, np.int32).tobytes()
        numbers.append(zlib.crc32(key + np.int64(seen[key]).tobytes()) >> 1)
        seen[key] += 1
    return numbers


@partial(jax.jit, static_argnames="definition")
def _token_scores(
    params: lm.Params, batch: dict[str, jax.Array], definition: lm.Definition
) -> tuple[jax.Array, jax.Array]:
    model = lm.merge(definition, params)
    hidden, _ = model(batch["tokens"], Rows(batch["segment_ids"], batch["positions"]))
    return loss.per_token(hidden, model.head_matrix(), batch["targets"], definition.model.logit_cap)


def load(
    workdir: str | Path,
    step: int | None = None,
    tokenizer: str = "",
    batch_tokens: int = 1 << 15,
    ema: bool = False,
) -> Subject:
    """The run in ``workdir`` at ``step`` (None: its newest checkpoint), on one device.

    tokenizer: "bytes" or a tokenizer.json, where the run's own is not to be found.
    ema: with the average of its weights (optimizer.ema).
    """
    config, definition, params, step = weights.load(workdir, step, ema)
    tokens = tokenizers.load(tokenizer, "--tokenizer") if tokenizer else weights.tokenizer(workdir, config)
    if tokens is not None:
        tokens.more_ends = weights.ends(Path(workdir), tokens)
        weights.check_fits(tokens, definition.vocab_size)
    checkpoint = seal.identity(Path(workdir) / "checkpoints" / str(step))
    return Subject(definition, params, tokens, config, step, batch_tokens, checkpoint)
