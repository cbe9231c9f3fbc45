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
    if config.eval.tasks:  # the mean of those measured in the loop
        chances = [task.chance(config) for task in tasks.choose("", config.eval.tasks)]
        known = [one for one in chances if one is not None]
        recall = sum(known) / len(known) if len(known) == len(chances) else None
    return {"recall": recall, "loss": loss}
