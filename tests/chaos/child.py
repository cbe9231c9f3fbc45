"""train.py as a trial of `tests.chaos` runs it: slowed down, and with whatever its environment asks for.

CHAOS_POISON: checksums of the batches whose loss becomes nan, in the compiled program.
CHAOS_BREAKS: what raises each time that it is tried, keys of BREAKS with + between; "final save" kills.
CHAOS_PAUSE: seconds before each step, so that faults fall between steps and not only into the start.
CHAOS_MEET, CHAOS_SILENT: seconds that processes wait for each other at the start, and for signs of life.
"""

import os
import signal
import sys
import time
from types import SimpleNamespace

import jax.numpy as jnp

import train
from hybridlm import loop, member, sharding
from hybridlm.objectives import next_token
from hybridlm.run import checkpoint, logbook, meeting, picture, processes

NONE = (-1, -2, -3, -4, -5)  # no batch's checksums; equal ones XLA would fold, and fuse the rest otherwise


def checksum(tokens, numpy):
    """Tells the batches of these small runs apart."""
    flat = tokens.reshape(-1)
    return numpy.sum(flat * numpy.arange(1, flat.size + 1, dtype=flat.dtype))


def full(*_, **__):
    raise OSError(28, "No space left on device")


def wandb(init):
    """A W&B whose server goes away after ``init``."""
    sys.modules["wandb"] = SimpleNamespace(init=init, Settings=dict)


def talk_to(descriptor):
    os.dup2(descriptor, 1)


def deaf():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def kill_before_the_final_seal():
    """When the last line of metrics is on disk, and all of the last checkpoint but its seal."""
    seal = checkpoint.Checkpoints._seal

    def last(self):
        steps = {path.name.partition(".")[0] for path in self.directory.glob(checkpoint.HALF_WRITTEN)}
        if steps & {os.environ["CHAOS_STEPS"]}:
            metrics = self.directory.parent / "metrics.jsonl"
            while not any(str(line["step"]) in steps for line in logbook.read(metrics)):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        seal(self)

    checkpoint.Checkpoints._seal = last


BREAKS = {
    "": lambda: None,
    "validation": lambda: setattr(loop.Loop, "validated", full),
    "tasks": lambda: setattr(train.in_loop, "build", lambda config: full),
    "sample": lambda: setattr(member, "sample", full),
    "plot": lambda: setattr(picture, "plot", full),
    "W&B at its start": lambda: wandb(full),
    "W&B": lambda: wandb(lambda **_: SimpleNamespace(log=full, finish=full)),
    "stdout, full": lambda: talk_to(os.open("/dev/full", os.O_WRONLY)),
    "stdout, closed": lambda: talk_to(deaf()),
    "final save": kill_before_the_final_seal,
}


def poison(sums):
    honest = next_token.Objective.loss
    poisoned = [int(total) for total in sums.split(",") if total]
    poisoned += NONE[len(poisoned) :]  # poisoned or not, one program up to constants, and so the same bits

    def loss(self, params, frozen, batch, wanted=()):
        total, sums = honest(self, params, frozen, batch, wanted)
        struck = jnp.isin(checksum(batch["tokens"], jnp), jnp.array(poisoned))
        return total * jnp.where(struck, jnp.nan, 1.0), sums

    next_token.Objective.loss = loss


def slow_down(seconds):
    put = sharding.put_batch

    def slowly(*args):
        time.sleep(seconds)
        return put(*args)

    sharding.put_batch = slowly


def main(arguments: list[str]) -> int:
    asked = os.environ.get
    if "CHAOS_POISON" in os.environ:
        poison(asked("CHAOS_POISON"))
    slow_down(float(asked("CHAOS_PAUSE", "0")))
    meeting.MEET_SECONDS = int(asked("CHAOS_MEET", meeting.MEET_SECONDS))
    processes.SILENT_SECONDS = float(asked("CHAOS_SILENT", processes.SILENT_SECONDS))
    for what in asked("CHAOS_BREAKS", "").split("+"):
        BREAKS[what]()
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
