"""What guessing would score: the dotted line of a report."""

import math

from eval import tasks
from eval.tasks import labelled
from hybridlm.config import Config


def of(config: Config) -> dict[str, float | None]:
    """ "recall" and "loss" of an answer drawn from all that are possible; None where that is not defined.

    config: resolved. The loss of text is that of a uniform token, ln V nats.
    """
    vocab = config.model.vocab_size
    answers, recall = labelled.guess(config.data, vocab)
    text = config.data.kind in ("text", "shards", "mixture")
    loss = math.log(vocab) if text else math.log(answers) if answers else None
    if config.eval.tasks:
        return {"recall": _mean_chance(config), "loss": loss}
    return {"recall": recall, "loss": loss}


def _mean_chance(config: Config) -> float | None:
    """Of the tasks measured in the loop; None if one of them has none."""
    found = [task.chance(config) for task in tasks.choose("", config.eval.tasks)]
    known = [one for one in found if one is not None]
    return sum(known) / len(known) if len(known) == len(found) else None
