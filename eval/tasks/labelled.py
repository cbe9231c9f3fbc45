"""Tasks that models are trained on: held-out examples of `hybridlm.data`, one to a row, labels on tokens.

A sample's score is the share of its labelled tokens that are predicted right, each from the tokens before it.
If the run was trained on the same kind of data, its settings (number of stacks, noise, ...) are kept; ids
are drawn from the model's whole vocabulary, as in training.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from eval.subject import Progress, Subject
from eval.tasks.base import Setting
from hybridlm import data
from hybridlm.config import Config
from hybridlm.data import (
    copying,
    counting,
    joint_recall,
    latent_recall,
    listops,
    mad,
    mixture,
    pathfinder,
    phonebook,
    regression,
    state_tracking,
)
from hybridlm.fields import plain

log = logging.getLogger("hybridlm")
Settings = Mapping[str, Any]
DECIDE = ("kind", "task", "group")  # which settings make a task; others are its size
OF_TRAINING = ("train_examples", "weight")


@dataclasses.dataclass(frozen=True)
class LabelTask:
    """settings: of the data, kind first.
    choices: (settings, vocabulary) -> number of answers that a label can be.
    whole: labels of an example, all of which must be right for it to count; 0 counts each by itself.
    constant: settings -> score of the best answer that is always the same, where labels are not uniform.
    """

    name: str
    source: str
    about: str
    settings: Settings
    choices: Callable[[Settings, int], int]
    lengths: tuple[int, ...] = (256,)
    text: bool = False
    whole: int = 0
    constant: Callable[[Settings], float] | None = None

    def data_config(self, run: data.Config, samples: int) -> dict[str, Any]:
        """This task's settings over those of the run's own data, where it has the same kind."""
        kind = self.settings["kind"]
        parts = run.components.values() if isinstance(run, mixture.Config) else [run]
        own = next((plain(part) for part in parts if part.kind == kind), {})
        kept = {name: value for name, value in own.items() if name not in ("slices", *OF_TRAINING)}
        return {**kept, **self.settings, "val_examples": samples}

    @property
    def seeded(self) -> bool:
        return self.settings["kind"] != "labelled_text"  # whose texts are a file's

    def examples(self, subject: Subject, setting: Setting) -> str:
        """The settings of the data, the ids that they are drawn from, and the seed that draws them, if not 0:
        what was measured before `--seed` did has those of 0 under any."""
        whole = plain(data.settings(self.data_config(subject.config.data, 1)))
        decisive = {n: v for n, v in sorted(whole.items()) if n not in ("val_examples", *OF_TRAINING)}
        seed = f", drawn with {setting.seed}" if setting.seed else ""
        # Earlier releases scored a row, also where several samples share it.
        apart = ", each by itself" if self._own_length(self._held_out(subject, setting, 1), setting) else ""
        return f"{subject.definition.vocab_size} ids, {decisive}{seed}{apart}"

    def _held_out(self, subject: Subject, setting: Setting, rows: int) -> data.Dataset:
        return data.build(
            self.data_config(subject.config.data, setting.samples),
            split="val", batch_size=rows, seq_len=setting.length, seed=0,
            vocab_size=subject.definition.vocab_size, held_out=setting.seed,
        )  # fmt: skip

    def _own_length(self, held_out: data.Dataset, setting: Setting) -> int:
        """Of a sample, where several share a row; else 0."""
        own = getattr(held_out.source, "length", setting.length)
        return own if 2 * own <= setting.length else 0

    def chance(self, config: Config) -> float | None:
        settings = plain(data.settings(self.data_config(config.data, 1)))
        drawn = 1 / self.choices(settings, config.model.vocab_size) ** max(1, self.whole)
        return max(drawn, self.constant(settings)) if self.constant else drawn

    def run(self, subject: Subject, setting: Setting, progress: Progress) -> np.ndarray:
        rows = min(subject.rows_per_batch(setting.length), setting.samples)
        held_out = self._held_out(subject, setting, rows)
        if own := self._own_length(held_out, setting):
            say_short(f"{self.name}@{setting.length}", own)
        scores: list[float] = []
        for index in range(held_out.num_batches or 0):
            batch = held_out.batch(index)
            there = batch["targets"] >= 0
            ids = batch["segment_ids"]  # a row may hold several examples
            example = (np.arange(len(ids))[:, None] * (ids.max() + 1) + ids)[there]
            counted = np.bincount(example)
            correct = np.bincount(example, subject.token_scores(batch)[1][there])
            real = counted > 0  # the last batch is filled up with padding
            share = correct[real] / counted[real]
            scores += (np.floor(share) if self.whole else share).tolist()
            progress(int(real.sum()))
        return np.array(scores)


@functools.cache
def say_short(name: str, length: int) -> None:
    """Says, once, that the contexts of a measurement are not as long as asked."""
    said = "%s: its samples have %d tokens each, several to a row: their context is no longer than that"
    log.warning(said, name, length)


def _mad_choices(settings: Settings, vocab: int) -> int:
    task = settings["task"]
    if task == "memorization":
        return (vocab - 1) // 2
    if task == "selective_copying":
        return vocab - 2
    vocab -= settings["noise_vocab"] if task == "noisy_in_context_recall" else 0
    vocab -= task == "fuzzy_in_context_recall"
    return vocab - vocab // 2


ABOUT = {
    "palindrome": "the first half again, from its end",
    "copy": "the first half again",
    "induction": "the token that followed the mark",
    "in_context_recall": "values of keys that came before",
    "noisy_in_context_recall": "the same among noise",
    "fuzzy_in_context_recall": "the same, keys and values of several tokens",
    "memorization": "values that are the same in every example and never shown",
    "selective_copying": "tokens among blanks, in order",
}
COPYING = {
    "palindrome": ("Kimi Linear, arXiv 2510.26692, 5.1", 256),
    "copy": ("Jelassi et al. 2024, arXiv 2402.01032", 256),
    "induction": ("H3, arXiv 2212.14052, 3.1", 30),
}
MAD_LENGTHS = {"memorization": 32, "selective_copying": 256}
LRA = "Long Range Arena, arXiv 2011.04006"

TASKS = [
    *(
        LabelTask(
            f"mqar_{pairs}", "Zoology, arXiv 2312.04927; slices of Based", f"values of {pairs} keys",
            {"kind": "mqar", "num_pairs": pairs}, lambda settings, vocab: vocab - vocab // 2,
            (max(64, 4 * pairs),),
        )
        for pairs in (4, 8, 16, 32, 64, 128, 256)
    ),
    *(
        LabelTask(
            f"joint_recall_{size}", "HAX, arXiv 2507.00449",
            f"values of {size} keys in each of {size} contexts",
            {"kind": "joint_recall", "contexts": size, "keys": size},
            lambda settings, vocab: joint_recall.IDS, (joint_recall.length(size, size),),
        )
        for size in (5, 8, 16)
    ),
    *(
        LabelTask(
            task, COPYING[task][0], ABOUT[task], {"kind": "copying", "task": task},
            lambda settings, vocab: vocab - 1, (COPYING[task][1],),
        )
        for task in copying.TASKS
    ),
    LabelTask(
        "stack", "Kimi Linear, arXiv 2510.26692, 5.1", "what comes off one of many stacks", {"kind": "stack"},
        lambda settings, vocab: vocab - 2 - settings["num_stacks"],
    ),
    *(
        LabelTask(
            f"mad_{task}", "MAD, arXiv 2403.17844", ABOUT[task], {"kind": "mad", "task": task}, _mad_choices,
            (MAD_LENGTHS.get(task, 128),),
        )
        for task in mad.TASKS
    ),
    *(
        LabelTask(
            group, "DeltaProduct, arXiv 2502.10297", "the product so far, at every token",
            {"kind": "state_tracking", "group": group},
            lambda settings, vocab: len(state_tracking.elements(settings["group"])), (128, 256, 512),
        )
        for group in state_tracking.GROUPS
    ),
    LabelTask(
        "selective_copying", "Mamba, arXiv 2312.00752, 4.1", "16 tokens among up to 4096, in order",
        {"kind": "mad", "task": "selective_copying", "copied": 16}, _mad_choices, (256 + 17, 4096 + 17),
    ),
    *(
        LabelTask(
            f"counting_{ids}", "Yehudai et al. 2024, arXiv 2407.15160",
            f"how often the last of {2 * ids} tokens, of {ids} ids, has come",
            {"kind": "counting", "elements": 2 * ids, "ids": ids},
            lambda settings, vocab: settings["elements"], (counting.length(2 * ids),),
            constant=lambda settings: counting.constant(settings["elements"], settings["ids"]),
        )
        for ids in (8, 32, 64)
    ),
    *(
        LabelTask(
            f"phonebook_{entries}", "Jelassi et al. 2024, arXiv 2402.01032; bytes",
            f"the ten digits of one of {entries} names",
            {"kind": "phonebook", "entries": entries}, lambda settings, vocab: 10,
            (phonebook.length(entries),), whole=phonebook.DIGITS,
        )
        for entries in (4, 16, 64)
    ),
    *(
        LabelTask(
            f"latent_recall_{pairs}", "after NoLiMa, arXiv 2502.05167",
            f"values of {pairs} keys, asked for by their topics",
            {"kind": "latent_recall", "pairs": pairs},
            lambda settings, vocab: vocab - 1 - 2 * (settings["concepts"] or (vocab - 1) // 4),
            (latent_recall.length(pairs),),
        )
        for pairs in (4, 16, 64)
    ),
    *(
        LabelTask(
            f"regression_{segment}" if segment else "regression", "after arXiv 2501.12352, 2510.01450",
            "values of a linear map" + (f", a new one every {segment} pairs" if segment else ""),
            {"kind": "regression", "features": 6, "segment": segment},
            lambda settings, vocab: 2 * settings["features"] + 1, (64, 256),
            constant=lambda settings: regression.constant(settings["features"]),
        )
        for segment in (0, 32)
    ),
    LabelTask(
        "listops", LRA, "the value of a nested expression", {"kind": "listops"},
        lambda settings, vocab: listops.DIGITS, (200, 2000), constant=lambda settings: listops.CONSTANT,
    ),
    LabelTask(
        "pathfinder", LRA, "whether two discs are the ends of one dashed curve", {"kind": "pathfinder"},
        lambda settings, vocab: 2, (pathfinder.length(32),),
    ),
    LabelTask(
        "byte_text", LRA, "the class of a text, in bytes (the run's data, kind labelled_text)",
        {"kind": "labelled_text"}, lambda settings, vocab: settings["classes"], (1024, 4096),
    ),
]  # fmt: skip


def guess(settings: data.Config, vocab: int) -> tuple[int | None, float | None]:
    """(answers that a label can be, score of guessing) of a run's own task; None for text and mixtures."""
    own = plain(settings)
    for task in TASKS:
        if all(own.get(name) == value for name, value in task.settings.items() if name in DECIDE):
            answers = task.choices(own, vocab)
            return answers, max(1 / answers, task.constant(own) if task.constant else 0.0)
    return None, None
