"""Checkpoints: Orbax, asynchronous, newest N and the best by a metric. The only module that knows Orbax.

A checkpoint at step s is a directory ``checkpoints/<s>`` with one item per entry of the training state, each
a flat mapping from dotted names to arrays (``params`` can be read without the rest), and ``run``, a JSON
record of everything else that resumption needs: step, config, layers, data fingerprint. The seed in the
config and the step are all the randomness there is. Arrays are global: what one mesh wrote, another reads.
Every file is hashed before the directory gets its name (`hybridlm.run.seal`), and again before it is read.
"""

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from hybridlm import pattern, trees, untrusted
from hybridlm.errors import ConfigError, RunError, first_line
from hybridlm.run import seal, sound
from hybridlm.run.sound import COMMITTED, HALF_WRITTEN

log = logging.getLogger("hybridlm")
logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs, with stack traces, what it also raises

State = dict[str, Any]

FORMAT = 2  # in the record: parameters by layer (1, without a number: stacked, hybridlm 0.1.0)
CHUNK_BYTES = 1 << 25  # on disk, of arrays that are written in pieces
COMPRESSOR = {"id": "zstd", "level": 1}  # Orbax's own

SEEN = "data.fingerprint"
# What a resumed run has in common with its checkpoint: parameters in shape and meaning, and the data order.
FIXED = (
    "model",
    "mixers",
    "mlps",
    SEEN,
    "train.seed",
    "train.batch_size",
    "train.seq_len",
    "optimizer.name",
    "optimizer.freeze",
    "optimizer.ema",
    "stages",
)
RECORD = {
    "config": dict, "fingerprint": str, "format?": int, "skipped?": [untrusted.NATURAL],
    "unwritten?": {str: (float, str, type(None))}, "teacher?": {str: str}, "held_out?": {str: str},
}  # fmt: skip
SPENT = ("init_from", "init_gates")  # read at the start of a run, and never again
PATTERN, SHOWN = "model.pattern", 8  # of the differences
FREE = ("model.remat", "model.scan", "model.dtype", "model.matmul")  # below FIXED, yet no part of the state


class Keep(NamedTuple):
    """Orbax preservation policy: the ``last`` newest, and the ``best`` lowest of those that have a score.

    whole: not the remains of a checkpoint whose removal was killed; they are to go, whatever their score was.
    """

    last: int
    best: int
    scores: dict[int, float]
    whole: Callable[[int], bool]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [one.step for one in checkpoints]
        scored = [step for step in steps if step in self.scores and self.whole(step)]
        ranked = sorted(scored, key=self.scores.__getitem__)
        kept = {*steps[-self.last :], *ranked[: self.best]}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one run.

    directory: made when missing.  last: how many of the newest stay.  best: how many stay beside them for the
    lowest of ``scores``.
    scores: step -> what it is ranked by, for the caller to fill once it is known, after the save; a step
        without is none of the best.
    """

    def __init__(self, directory: str | Path, last: int = 2, best: int = 1):
        self.directory = Path(directory).resolve()  # Orbax and tensorstore take no ".."
        self.scores: dict[int, float] = {}
        whole = lambda step: (self.directory / str(step) / COMMITTED).exists()
        self.filling: int | None = None  # the step that `create` made, which changes until the end
        self.sound: set[int] = set()
        self.need = 0
        options = ocp.CheckpointManagerOptions(
            preservation_policy=Keep(last, best, self.scores, whole),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        self.names: dict[str, set[str]] = {}
        with translated(self.directory, "checkpoints cannot be kept there"):
            self.manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(self.manager.all_steps())

    def chosen(self, step: int | None) -> int:
        """``step``, or the newest for None; ConfigError where there is no such checkpoint."""
        steps, workdir = self.steps(), str(self.directory.parent)
        if not steps:
            raise ConfigError("--workdir", workdir, "holds no complete checkpoint", "Train the run first.")
        if step not in (None, *steps):
            problem = f"there is no checkpoint at step {step}: there are checkpoints at steps "
            raise ConfigError("--workdir", workdir, problem + ", ".join(map(str, steps)))
        return steps[-1] if step is None else step

    def save(self, step: int, state: State, record: dict[str, Any]) -> None:
        """Starts writing; returns once ``state`` may be overwritten. Waits for the previous save first.

        RunError when the disk has no room or the previous save failed; earlier checkpoints are intact.
        """
        self.wait()
        self.need = need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < need:
            raise RunError(
                f"checkpoint at step {step} needs {need:,} bytes but {self.directory} has {free:,} free;"
                f" {self._intact()}. Free space and start again with --resume=auto."
            )
        flat = {name: trees.flatten(tree) for name, tree in state.items()}
        self.names = {name: set(tree) for name, tree in flat.items()}
        items = {name: ocp.args.StandardSave(tree) for name, tree in flat.items()}
        args = ocp.args.Composite(**items, run=ocp.args.JsonSave(record))
        what = f"the checkpoint at step {step} could not be written ({need:,} bytes)"
        with translated(self.directory, what, self._intact):
            self.manager.save(step, args=args, force=True)
            self._clear_marks()

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record that was saved with ``step``; RunError when the checkpoint is damaged."""
        self._verify(step)
        with self._reading(step):
            found = self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
            untrusted.check_shape(found, RECORD, "its record")
            return found

    def restore(self, step: int, like: State) -> State:
        """Entries of the state of ``step``; ``like``: ShapeDtypeStructs, with shardings, of those wanted.

        RunError when the checkpoint is damaged.
        """
        self._verify(step)
        items = {name: ocp.args.StandardRestore(trees.flatten(tree)) for name, tree in like.items()}
        with self._reading(step):
            restored = self.manager.restore(step, args=ocp.args.Composite(**items))
        return {name: trees.unflatten(tree, restored[name]) for name, tree in like.items()}

    def create(self, step: int, entry: str, like: Any, record: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint of zeros for a caller to fill piece by piece; its arrays, as `open` returns them.

        like: tree of float32 shapes.
        Orbax gets a number in place of each array, since it would write them all at once.
        """
        sound.check_place(self.directory)
        self.filling = step
        leaves = trees.flatten(like)
        numbers = {name: np.zeros((), np.float32) for name in leaves}
        items = {entry: ocp.args.StandardSave(numbers), "run": ocp.args.JsonSave(record)}
        with translated(self.directory, f"the checkpoint at step {step} could not be written", self._intact):
            self.manager.save(step, args=ocp.args.Composite(**items), force=True)
        self.wait()

        def spec(shape: tuple[int, ...]) -> dict[str, Any]:
            rows = [max(1, min(n, CHUNK_BYTES // (4 * math.prod(shape[1:])))) for n in shape[:1]]
            chunks = [*rows, *shape[1:]]
            metadata = {"shape": shape, "chunks": chunks, "dtype": "<f4", "compressor": COMPRESSOR}
            return {"metadata": metadata, "create": True, "delete_existing": True}

        return self._arrays(step, entry, {name: spec(x.shape) for name, x in leaves.items()})

    def open(self, step: int, entry: str, names: Iterable[str]) -> dict[str, Any]:
        """Arrays of one entry of the state by dotted name, on disk: indexing reads, assigning writes."""
        self._verify(step)
        return self._arrays(step, entry, {name: {"open": True} for name in names})

    def _arrays(self, step: int, entry: str, specs: dict[str, dict[str, Any]]) -> dict[str, Any]:
        with self._reading(step, entry):
            path = self.directory / str(step) / entry
            return {name: sound.array(path, name, **spec) for name, spec in specs.items()}

    def wait(self) -> None:
        """Returns when every save is on disk; RunError when one failed."""
        what = f"a checkpoint could not be written ({self.need:,} bytes)"
        with translated(self.directory, what, self._intact):
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
            self._clear_marks()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            self.wait()
            if error is None and self.filling is not None:
                seal.write(self.directory / str(self.filling))
        except RunError as failed:
            if error is None:
                raise
            log.error("%s", failed)  # the first error is the one to report
        finally:
            self.manager.close()

    def _seal(self) -> None:
        """Called by Orbax when all files of a save are written and the directory has not got its name yet."""
        for written in self.directory.glob(HALF_WRITTEN):
            for mark in written.glob(f"*/{COMMITTED}"):
                os.truncate(mark, 0)
            if self.filling is None:
                sound.prove(written, self.names)
                seal.write(written)

    def _clear_marks(self) -> None:
        """Orbax writes the path of a checkpoint into it, and with it the user's name; it reads it nowhere."""
        for path in self._complete() if jax.process_index() == 0 else ():
            with contextlib.suppress(FileNotFoundError):  # it is being removed
                os.truncate(path / COMMITTED, 0)

    def _complete(self) -> list[Path]:
        """By what is on disk: Orbax counts a save among its steps before it has succeeded."""
        return [path for path in untrusted.numbered(self.directory) if (path / COMMITTED).exists()]

    def _verify(self, step: int) -> None:
        """RunError when the files of ``step`` are not what was written; each step is read once for this."""
        if jax.process_index() or step in self.sound or step == self.filling:
            return
        path = self.directory / str(step)
        with self._reading(step):
            problem = seal.damage(path) or sound.astray(path) or sound.misnamed(path)
        if problem:
            raise RunError(f"{path}: damaged checkpoint: {problem}; {self._without(step)}.")
        self.sound.add(step)

    def _reading(self, step: int, entry: str = "") -> contextlib.AbstractContextManager[None]:
        path = self.directory / str(step) / entry
        return translated(path, "unreadable checkpoint", lambda: self._without(step))

    def _intact(self) -> str:
        if not (whole := self._complete()):
            return "no earlier checkpoint exists"
        return f"the checkpoint at step {whole[-1].name} is intact"

    def _without(self, step: int) -> str:
        if not (self.directory / str(step)).exists():
            return "the run that goes on there has removed it meanwhile: start again, for its newest"
        older = [other for other in self.steps() if other < step]
        if not older:
            return "no older checkpoint exists"
        return f"remove that directory to resume from step {older[-1]}"


@contextlib.contextmanager
def translated(path: Path, what: str, hint: Callable[[], str] | None = None) -> Iterator[None]:
    """Turns whatever storage raises into a RunError that says what failed, where, why, and ``hint()``."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        full = "No space left on device"
        reason = full if full in str(error) else first_line(error)
        raise RunError(f"{path}: {what}: {reason}" + (f"; {hint()}" if hint else "") + ".") from error


def choose(mode: str, checkpoints: Checkpoints) -> int | None:
    """The step to resume from, or None to start anew.

    mode "auto": the newest checkpoint if there is one; "must": ConfigError without one; "never": ConfigError
    with one, since starting anew would mix two runs in one workdir.
    """
    steps, where = checkpoints.steps(), checkpoints.directory
    if mode == "must" and not steps:
        raise ConfigError("--resume", mode, f"there is no checkpoint in {where}", "Check --workdir.")
    if mode == "never" and steps:
        problem = f"{where} already holds checkpoints up to step {steps[-1]}"
        raise ConfigError("--resume", mode, problem, "Give another --workdir, or --resume=auto to continue.")
    return steps[-1] if steps else None


def check_unchanged(saved: dict[str, Any], record: dict[str, Any]) -> None:
    """ConfigError, with a diff, when ``record`` (of this run) cannot continue ``saved`` (of the checkpoint).

    Data are the same when their fingerprint is, wherever they lie.
    """
    found = changes(*(r["config"] | {SEEN: r["fingerprint"]} for r in (saved, record)))
    judged = {name: _of_last(name, record["config"]) for name in found}
    fixed = (*FIXED, "data") if SEEN in found else FIXED
    refused = [name for name, one in judged.items() if _under(one, fixed) and not _under(one, FREE)]
    refused.sort(key=SEEN.__eq__)  # what a user set is named before what follows from it
    if PATTERN in refused and _respelt(*found[PATTERN], record["config"]):
        refused.remove(PATTERN)
    if PATTERN in refused:  # most other differences follow from it, and none is what was meant
        before, after = found[PATTERN]
        problem = f"this workdir holds a run of another pattern, {before!r}"
        fix = "\nGive another --workdir to start anew, or the old pattern to go on."
        raise ConfigError(PATTERN, after, problem, fix)
    said = {name: f"{name}: {before!r} -> {after!r}" for name, (before, after) in found.items()}
    if refused:
        shown = [said[name] for name in refused[:SHOWN]]
        shown += [f"and {len(refused) - SHOWN} more"] if len(refused) > SHOWN else []
        problem = "a resumed run cannot change it; changed since the checkpoint: " + "; ".join(shown)
        fix = "Restore the old values, or start anew in another --workdir."
        raise ConfigError(refused[0], found[refused[0]][1], problem, fix)
    for name, change in said.items():
        if name in SPENT:
            log.warning("no effect on a resumed run, whose parameters are the checkpoint's: %s", change)
        else:
            log.info("resumed with a change: %s", change)


def _of_last(name: str, config: dict[str, Any]) -> str:
    """``name`` without stages.<the last>, whose settings may change as those of a run without stages."""
    order = config.get("stages", {}).get("order", ("",))
    return name.removeprefix(f"stages.{order[-1]}.")


def _respelt(before: str, after: str, config: dict[str, Any]) -> bool:
    """Whether two patterns spell the same layers."""
    with contextlib.suppress(ConfigError):  # of an older version
        depth = config["model"].get("num_layers", 0)
        return pattern.fill(pattern.parse(before), depth) == pattern.fill(pattern.parse(after), depth)
    return False


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (before, after) of what differs in two configs' dicts."""
    before, after = dotted(old), dotted(new)
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return {name: (before.get(name, "absent"), after.get(name, "absent")) for name in names}


def dotted(tree: Any) -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}, values as JSON would give them back."""
    found = trees.flatten(tree, lambda node: not isinstance(node, dict) or not node)
    return {name: untrusted.parse(json.dumps(value)) for name, value in found.items()}


def _under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
