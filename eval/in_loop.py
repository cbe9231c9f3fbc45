"""Tasks in the training loop: config.eval.tasks, measured beside each validation."""

import logging

import jax

from eval import haystack, runner, tasks
from eval.subject import Subject
from hybridlm import commands
from hybridlm.config import Config
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError
from hybridlm.member import Evaluate, Metrics
from hybridlm.model import Definition, Params

log = logging.getLogger("hybridlm")


def build(config: Config) -> Evaluate | None:
    """What `trainer.train` calls, None if the config wants no tasks; ConfigError for unknown ones.

    A task that fails costs no other task its numbers, and no number that is not finite is given.
    """
    wanted = config.eval
    if not wanted.tasks:
        return None
    if jax.process_count() > 1:
        fix = f"Evaluate the checkpoints with {commands.typed('python -m eval')}."
        raise ConfigError("eval.tasks", wanted.tasks, "are measured in runs of one process only", fix)
    try:
        chosen = tasks.choose("", wanted.tasks)
    except ConfigError as error:
        raise ConfigError("eval.tasks", error.value, error.allowed, error.fix) from None
    lengths = tuple(wanted.task_lengths) or (config.train.seq_len,)
    one = tasks.Setting(0, wanted.task_samples, config.train.seed, haystack.load())
    plan = runner.Plan(lengths, one)

    told: set[str] = set()

    def evaluate(definition: Definition, params: Params, tokenizer: Tokenizer | None, step: int) -> Metrics:
        failed: dict[str, Exception] = {}
        subject = Subject(definition, params, tokenizer, config, step)
        results = runner.measure(subject, chosen, plan, left_out=failed.__setitem__)
        for name, error in failed.items():
            if name not in told:  # once, not at every validation
                log.warning("%s left out: %s", name, error or type(error).__name__)
                told.add(name)
        if failed and not results:
            raise next(iter(failed.values()))  # an event of the run, which goes on
        return runner.metrics(results.items())

    return evaluate
