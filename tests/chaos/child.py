"""train.py as a trial of `tests.chaos` runs it: slowed down, and with the loss of some steps made nan.

CHAOS_POISON: checksums of the batches whose loss becomes nan, in the compiled program.
CHAOS_PAUSE: seconds before each step, so that faults fall between steps and not only into the start.
"""

import os
import sys
import time

import jax.numpy as jnp

import train
from hybridlm import sharding
from hybridlm.objectives import next_token

NONE = (-1, -2, -3, -4, -5)  # no batch's checksums; equal ones XLA would fold, and fuse the rest otherwise


def checksum(tokens, numpy):
    """Tells the batches of these small runs apart."""
    flat = tokens.reshape(-1)
    return numpy.sum(flat * numpy.arange(1, flat.size + 1, dtype=flat.dtype))


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
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
