"""Tasks in the training loop: config.eval.tasks, measured beside each validation."""

from typing import Any

import jax

from eval import haystack, runner, tasks
from eval.subject import Subject
from hybridlm.config import Config
from hybridlm.errors import ConfigError
from hybridlm.member import Evaluate, Metrics


def build(config: Config) -> Evaluate | None:
    """What `trainer.train` calls, None if the config wants no tasks; ConfigError for unknown ones."""
    wanted = config.eval
    if not wanted.tasks:
        return None
    if jax.process_count() > 1:
        fix = "Evaluate the checkpoints with python -m eval."
        raise ConfigError("eval.tasks", wanted.tasks, "are measured in runs of one process only", fix)
    try:
        chosen = tasks.choose("", wanted.tasks)
    except ConfigError as error:
        raise ConfigError("eval.tasks", error.value, error.allowed, error.fix) from None
    lengths = tuple(wanted.task_lengths) or (config.train.seq_len,)
    plan = runner.Plan(lengths, wanted.task_samples, config.train.seed, haystack.load())

    def evaluate(definition: Any, params: Any, tokenizer: Any, step: int) -> Metrics:
        subject = Subject(definition, params, tokenizer, config, step)
        return runner.metrics(runner.measure(subject, chosen, plan).items())

    return evaluate
