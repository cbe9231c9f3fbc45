"""train.py as a trial of `tests.chaos` runs it: slowed down, and with the loss of some steps made nan.

CHAOS_POISON: checksums of the batches whose loss becomes nan, in the compiled program.
CHAOS_BREAKS: what raises each time that it is tried: validation, sample, plot, wandb or stdout.
CHAOS_PAUSE: seconds before each step, so that faults fall between steps and not only into the start.
"""

import os
import sys
import time

import jax.numpy as jnp

import train
from hybridlm import member, sharding, trainer
from hybridlm.objectives import next_token
from hybridlm.run import logbook

NONE = (-1, -2, -3, -4, -5)  # no batch's checksums; equal ones XLA would fold, and fuse the rest otherwise


def checksum(tokens, numpy):
    """Tells the batches of these small runs apart."""
    flat = tokens.reshape(-1)
    return numpy.sum(flat * numpy.arange(1, flat.size + 1, dtype=flat.dtype))


def break_one(what):
    """Makes one of the ways of looking fail."""

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    owners = {"validation": trainer.Trainer, "sample": member, "plot": logbook}
    if what == "wandb":
        logbook.Tracker.__init__ = lambda self, *_: setattr(self, "run", Broken())
    elif what == "stdout":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif what:
        setattr(owners[what], what, broken)


class Broken:
    """A W&B run whose server is gone."""

    def log(self, *_, **__):
        raise OSError("no server")

    def finish(self, **_):
        raise OSError("no server")


def main(arguments: list[str]) -> int:
    poisoned = [int(total) for total in os.environ["CHAOS_POISON"].split(",") if total]
    poisoned += NONE[len(poisoned) :]  # poisoned or not, one program up to constants, and so the same bits
    honest, put = next_token.Objective.loss, sharding.put_batch

    def loss(self, params, frozen, batch, wanted=()):
        total, sums = honest(self, params, frozen, batch, wanted)
        struck = jnp.isin(checksum(batch["tokens"], jnp), jnp.array(poisoned))
        return total * jnp.where(struck, jnp.nan, 1.0), sums

    def slowly(*args):
        time.sleep(float(os.environ["CHAOS_PAUSE"]))
        return put(*args)

    next_token.Objective.loss = loss
    sharding.put_batch = slowly
    break_one(os.environ.get("CHAOS_BREAKS", ""))
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
