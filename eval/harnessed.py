"""A run as a model of lm-evaluation-harness (EleutherAI, `lm_eval`), which must be installed.

Pass a `HybridLM` to `lm_eval.simple_evaluate` to use it from Python. Requests are batched by length, padded
to a few ones, so that a handful of programs are compiled; what shares a context is read once with it.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from eval import subject
from hybridlm.errors import ConfigError, RunError
from hybridlm.generate import Sampling

log = logging.getLogger("hybridlm")


class HybridLM(TemplateLM):
    """A subject behind the harness's interface.

    max_length: tokens that the model sees at most; longer contexts lose their beginning. 0 is the length of
        the rows it was trained on.
    """

    def __init__(self, tested: subject.Subject, max_length: int = 0):
        super().__init__()
        self.subject, self.tokens = tested, tested.text_tokenizer
        self.max_length = max_length or tested.config.train.seq_len
        self.told: set[str] = set()

    @property
    def eot_token_id(self) -> int:
        """The document separator, which begins every document and so also every context."""
        return self.tokens.doc_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.name.replace("/", "__")

    @property
    def max_gen_toks(self) -> int:
        return min(256, self.max_length // 2)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokens.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs, cut = [], 0
        for (context, _), context_tokens, continuation in requests:
            if context:  # an empty one is the separator already
                context_tokens = [self.eot_token_id, *context_tokens]
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise RunError(
                    f"a continuation of {len(continuation)} tokens exceeds {self.max_length} tokens."
                )
            cut += len(context_tokens) > room
            pairs.append((context_tokens[-room:], continuation))
        self._tell(cut, len(pairs), f"{self.max_length} tokens are there")
        results = self.subject.log_likelihoods(pairs)
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once, in windows of max_length."""
        pairs, owners = [], []
        for index, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.eot_token_id, self.max_length, context_len=1
            )
            for window in windows:
                pairs.append(utils.make_disjoint_window(window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self.subject.log_likelihoods(pairs), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions; requests that share their generation settings go together."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        for indices in groups.values():
            settings = normalize_gen_kwargs(requests[indices[0]].args[1], self.max_gen_toks)
            # An empty stop string is in every text; it stops nothing.
            stop = [text for text in handle_stop_sequences(settings.get("until"), eos=None) if text]
            new = settings["max_gen_toks"]
            prompts = self._shortened([self.subject.encode(requests[i].args[0]) for i in indices], new)
            sampling = Sampling(
                temperature=settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0,
                top_k=settings.get("top_k", 0), top_p=settings.get("top_p", 1.0),
            )  # fmt: skip
            made = self.subject.complete(prompts, max_new_tokens=new, stop=stop, sampling=sampling)
            for index, text in zip(indices, made, strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _shortened(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """``prompts`` that leave room for ``new`` tokens: the harness cuts them at their beginning.

        Says so once; ConfigError where nothing would be left.
        """
        room = self.max_length - new
        if room < 1:
            allowed = f"must be less than the {self.max_length} tokens of the context, prompt included"
            raise ConfigError("max_gen_toks", new, allowed, "Give a longer --max_length.")
        cut = sum(len(prompt) > room for prompt in prompts)
        self._tell(cut, len(prompts), f"with max_gen_toks={new} of {self.max_length} tokens, {room} are left")
        return [prompt[-room:] for prompt in prompts]

    def _tell(self, cut: int, of: int, why: str) -> None:
        """Warns, once for each reason, that ``cut`` prompts lose their beginning."""
        if cut and why not in self.told:
            self.told.add(why)
            said = "%d of %d prompts are cut at their beginning: %s for a prompt; --max_length changes that"
            log.warning(said, cut, of, why)


def evaluate(
    tested: subject.Subject, tasks: Sequence[str], *, max_length: int = 0, num_fewshot: int | None = None,
    limit: int | None = None, include_path: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The harness's results. include_path: folder of further task files (yaml)."""
    model = HybridLM(tested, max_length)
    details = {"tokenizer": tested.text_tokenizer.name, "max_seq_lengths": [model.max_length]}
    manager = TaskManager(include_path=include_path, metadata=details)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        allowed = "lm-evaluation-harness knows no such task"
        raise ConfigError("--tasks", ", ".join(unknown), allowed, "`lm-eval ls tasks` lists them.")
    results = simple_evaluate(
        model, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager, metadata=details
    )
    assert results is not None  # only processes other than the first get none
    return results
