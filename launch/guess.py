"""What guessing would score: the dotted line of a report."""

import math

from eval import tasks
from eval.tasks import labelled
from hybridlm import data
from hybridlm.config import Config
from hybridlm.fields import plain

DECIDE = ("kind", "task", "group")  # which settings make a task; others are its size


def of(config: Config) -> dict[str, float | None]:
    """ "recall" and "loss" of an answer drawn from all that are possible; None where that is not defined.

    config: resolved. The loss of text is that of a uniform token, ln V nats.
    """
    vocab = config.model.vocab_size
    answers, constant = _answers(config.data, vocab)
    text = config.data.kind in ("text", "shards", "mixture")
    loss = math.log(vocab) if text else math.log(answers) if answers else None
    if config.eval.tasks:
        return {"recall": _mean_chance(config), "loss": loss}
    return {"recall": max(1 / answers, constant) if answers else None, "loss": loss}


def _answers(settings: data.Config, vocab: int) -> tuple[int | None, float]:
    """(number of answers that a label of the run's own task can be, None for text and mixtures; the score of
    always the same one where labels are not uniform, else 0)."""
    own = plain(settings)
    for task in labelled.TASKS:
        if all(own.get(name) == value for name, value in task.settings.items() if name in DECIDE):
            return task.choices(own, vocab), task.constant(own) if task.constant else 0.0
    return None, 0.0


def _mean_chance(config: Config) -> float | None:
    """Of the tasks measured in the loop; None if one of them has none."""
    found = [task.chance(config) for task in tasks.choose("", config.eval.tasks)]
    known = [one for one in found if one is not None]
    return sum(known) / len(known) if len(known) == len(found) else None
