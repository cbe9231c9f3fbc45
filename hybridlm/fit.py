"""`model.remat=auto`: the fastest training step that fits the devices' memory, found by compiling.

On a GPU the layers are unrolled where much of them is kept (`hybridlm.remat` says why), and scanned where
nothing is, or softmax attention's outputs alone: copying these is little beside making them for long rows.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from hybridlm import objectives, untrusted
from hybridlm.config import Config
from hybridlm.errors import RunError
from hybridlm.model import Definition
from hybridlm.run import processes, programs

log = logging.getLogger("hybridlm")

# `none` keeps float32 arrays, too, and takes 2.5 times as long to compile.
FASTEST_FIRST = ("most", "kernels", "dots", "mixer", "attention", "full")
UNROLLED = ("most", "kernels", "dots", "mixer")
SPLIT_FOR = ("dots", "mixer")  # what others keep besides gains no more than a microbatch more costs
LITTLE = ("mixer", "attention", "full")  # most of a layer is computed twice
SHARE = 0.97  # of the allocator's memory that a step may need: the rest is lost between its blocks
BESIDE = 0.04  # the share of what a step needs that is not in `held`, at least: 0.05 to 0.07 measured

LEAST_TOKENS = 8192  # that a device has of a microbatch which is chosen: a GPU is busy with these
OUTSIDE = 0.08  # of what a step needs, not in `held`: above what was measured, since nothing is compiled
NO_MEMORY = "RESOURCE_EXHAUSTED", "OUT_OF_MEMORY"  # how XLA says so, and CUDA


class Step(NamedTuple):
    """A compiled step, and the bytes of each device that it needs; None, and at least so many, for one that
    cannot fit and was not compiled."""

    run: Any
    needs: int


def step(
    config: Config,
    definition: Definition,
    mesh: Mesh,
    trace: Callable[[Definition], Any],
    ready: Callable[[], object] = lambda: None,
    runs: int = 1,
) -> Any:
    """The compiled training step: of what is traced for a definition, `model.remat` = "auto" decided.

    ready: waits for, or refuses, what need not be there until something is compiled.
    runs: that are trained together in the step.

    Where the devices do not say how much memory they have (CPUs), everything is kept. RunError if it finds
    nothing that fits.
    """
    finish = lambda policy: _compile(trace(settled(definition, policy)), ready)
    if definition.model.remat != "auto":
        return _compile(trace(definition), ready)
    available = limit()
    if available is None:
        return finish("none")
    memo = _memo("remat", config, mesh, available, runs)
    known, why = _noted(memo)
    if known:
        log.info("model.remat=auto: %s, as found before%s (%s)", known, why, memo)
        return finish(known)
    attempt = lambda policy: compiled(trace(settled(definition, policy)), available * mesh.size, ready)
    policy, found, said = choose(attempt, available)
    log.info("model.remat=auto: %s", said)
    if found.run is None or found.needs > available:
        raise RunError(_too_large(config, mesh, found.needs / available))
    if policy in LITTLE and (finer := _finer(config, mesh)):
        hint = "train.microbatches=%d (0: found out) may leave room to keep more, and compute less twice"
        log.info(hint, finer[0])
    _note(memo, policy)
    agreed = FASTEST_FIRST[processes.agree(FASTEST_FIRST.index(policy))]
    return found.run if agreed == policy else finish(agreed)


def parted(
    config: Config,
    definition: Definition,
    mesh: Mesh,
    trace: Callable[[Config, Definition], Any],
    available: int | None,
    runs: int = 1,
) -> Config:
    """``config`` with a number in place of `train.microbatches` = 0: the fewest with which projections, or at
    least the MLP's first, are not computed twice in ``available`` bytes a device.

    trace: makes the step of so many microbatches and a policy, by whose shapes it is found; none is compiled.
    runs: that are trained together in the step.

    A device has at least LEAST_TOKENS of each, or the whole batch. 1 where memory is unknown, or a loss
    stands beside the tokens' own: that of experts' balance is of each microbatch by itself.
    """
    if config.train.microbatches:
        return config
    memo = _memo("microbatches", config, mesh, available, runs)
    number = int(said) if (said := _content(memo)).isdecimal() else 0
    tokens = runs * _tokens(config, mesh)
    numbers = [m for m in _finer(config, mesh) if m == 1 or tokens >= m * LEAST_TOKENS]
    if number not in numbers:
        number = 1 if available is None else _fewest(config, definition, mesh, trace, available, numbers)
        _note(memo, str(number))
    number = processes.agree(number)
    log.info("train.microbatches=0: %d, of %d rows each", number, config.train.batch_size // number)
    return config.replace(train__microbatches=number)


def _fewest(
    config: Config, definition: Definition, mesh: Mesh, trace: Callable, available: int, numbers: list[int]
) -> int:
    room = (1 - OUTSIDE) * SHARE * available * mesh.size

    @functools.cache
    def traced(number: int, policy: str) -> Any:
        return trace(config.replace(train__microbatches=number), settled(definition, policy))

    own = objectives.load(config.objective.kind).terms
    for name in traced(numbers[-1], SPLIT_FOR[0]).out_info[1]:
        if name.endswith("_loss") and not name.startswith(own):
            log.info("train.microbatches=0: %s is of each microbatch by itself, and stays of the batch", name)
            return 1
    for policy in SPLIT_FOR:
        fits = lambda number, policy=policy: held(traced(number, policy).jaxpr.jaxpr) <= room
        if fits(numbers[-1]):
            return numbers[bisect.bisect_left(numbers[:-1], True, key=fits)]
    return numbers[-1]


def _tokens(config: Config, mesh: Mesh) -> int:
    """Of a step of one run, on each device."""
    split = math.prod(mesh.shape.get(axis, 1) for axis in ("data", "fsdp", "context"))
    return config.train.batch_size * config.train.seq_len // split


def _finer(config: Config, mesh: Mesh) -> list[int]:
    """More microbatches than there are, that divide a step's rows."""
    train, rows = config.train, mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
    more = range(train.microbatches + 1, train.batch_size + 1)
    return [m for m in more if train.batch_size % (m * rows) == 0]


def _too_large(config: Config, mesh: Mesh, times: float) -> str:
    """What to do about a step that needs so many times the memory there is."""
    enough = [m for m in _finer(config, mesh) if m >= times * config.train.microbatches]
    parts = f"train.microbatches={enough[0]} or higher, " if enough else ""
    least = f"model.remat={FASTEST_FIRST[-1]}"
    said = f"the training step needs {times:.1f} times a device's memory, even with {least}"
    return f"{said}. Set {parts}fewer or shorter rows, or use more devices."


@contextlib.contextmanager
def outgrown(of: Callable[[], Config], mesh: Mesh, runs: int = 1) -> Iterator[None]:
    """RunError for a step that runs out of memory after all; the next start then takes the next policy.

    of: the config as `step` had it.  runs: as `step` had them.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        config = of()
        if config.model.remat != "auto" or not any(one in str(error) for one in NO_MEMORY):
            raise
        memo = _memo("remat", config, mesh, limit(), runs)
        known, _ = _noted(memo)
        later = FASTEST_FIRST[FASTEST_FIRST.index(known) + 1 :] if known else ()
        said = f"the devices ran out of memory with what model.remat=auto chose{known and f', {known}'}"
        less = (
            ""
            if known == FASTEST_FIRST[-1]
            else f"model.remat to one that keeps less ({', '.join(FASTEST_FIRST[1:])}), or "
        )
        fix = f"Set {less}train.microbatches higher."
        if later and _note(memo, f"{later[0]}\n, since {known} ran out of memory"):
            fix = f"The same command goes on with {later[0]}, which keeps less."
        raise RunError(f"{said}. {fix}") from error


def choose(step: Callable[[str], Step], available: int) -> tuple[str, Step, str]:
    """(a policy, its step, what was found, for people): the first of `FASTEST_FIRST` whose step needs at most
    `SHARE` of the ``available`` bytes, else the last."""
    tried = []
    for policy in FASTEST_FIRST:
        began = time.perf_counter()
        try:
            found = step(policy)
        except jax.errors.JaxRuntimeError as error:  # too large even for the compiler's own trials
            if "RESOURCE_EXHAUSTED" not in str(error) or policy == FASTEST_FIRST[-1]:
                raise
            tried.append(f"{policy} more than there is")
            continue
        if found.run is None:
            tried.append(f"{policy} at least {found.needs / 2**30:.1f} GiB")
            continue
        tried.append(
            f"{policy} {found.needs / 2**30:.1f} GiB (compiled in {time.perf_counter() - began:.0f} s)"
        )
        if found.needs <= SHARE * available:
            break
    return policy, found, f"{policy}; of {available / 2**30:.1f} GiB a device " + ", ".join(tried)


def _compile(
    traced: Any, ready: Callable[[], object], options: dict[str, Any] | None = None, **lowering: Any
) -> Any:
    lowered = traced.lower(**lowering)
    ready()
    return lowered.compile(compiler_options=options)


def settled(definition: Definition, policy: str) -> Definition:
    """``definition`` with a policy in place of `auto`."""
    scan = definition.model.scan and policy not in UNROLLED
    settings: dict[str, Any] = {"remat": policy, "scan": scan}
    return dataclasses.replace(definition, model=dataclasses.replace(definition.model, **settings))


def compiled(
    traced: Any,
    most: int | None = None,
    ready: Callable[[], object] = lambda: None,
    options: dict[str, Any] | None = None,
    **lowering: Any,
) -> Step:
    """most: bytes of all devices; a step that cannot fit in them is not compiled, which takes a minute.

    ready: as for `step`.  options: of the compiler, besides the step's own.  lowering: arguments of
    ``traced.lower``.
    """
    least = held(traced.jaxpr.jaxpr)
    if most is not None and least > (1 - BESIDE) * SHARE * most:
        devices = jax.sharding.get_abstract_mesh().size or 1
        return Step(None, least // devices)
    run = _compile(traced, ready, options, **lowering)
    found = run.memory_analysis()
    return Step(run, found.argument_size_in_bytes + found.temp_size_in_bytes)


def held(jaxpr: Any) -> int:
    """Bytes of a step's arguments and of what its layers' forward passes leave to the backward passes.

    From the shapes in its jaxpr: what is alive at once up to the last rematerialised layer, whose insides do
    not count. 0 where no layer is rematerialised.
    """

    def inside(equation: Any) -> int:  # of microbatches
        body = equation.params["jaxpr"].jaxpr if equation.primitive.name == "scan" else None
        if body is None or not any(map(_is_layer, body.eqns)):
            return 0
        return held(body) - sum(map(_size, body.invars))

    until = max((i for i, one in enumerate(jaxpr.eqns) if _is_layer(one) or inside(one)), default=-1) + 1
    ends = {v: i for i, one in enumerate(jaxpr.eqns) for v in one.invars if not hasattr(v, "val")}
    ends |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not hasattr(v, "val")}
    alive = sum(map(_size, jaxpr.invars))
    most, ending = 0, [0] * (len(jaxpr.eqns) + 1)
    for i, one in enumerate(jaxpr.eqns[:until]):
        for v in one.outvars:
            if v in ends:
                alive += _size(v)
                ending[ends[v]] += _size(v)
        most = max(most, alive + inside(one))
        alive -= ending[i]
    return most


def _is_layer(equation: Any) -> bool:
    return equation.primitive.name in ("checkpoint", "remat", "remat2")


def _size(variable: Any) -> int:
    aval = variable.aval
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 0) if hasattr(aval, "shape") else 0


def limit() -> int | None:
    """Bytes that the allocators of this process's devices may take, the least; None if one does not say."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    return min(limits) or None


def _noted(memo: Path | None) -> tuple[str, str]:
    """(the policy in ``memo``, why it and none before it); "" where there is none."""
    known, _, why = _content(memo).partition("\n")
    return (known, untrusted.terminal(why)) if known in FASTEST_FIRST else ("", "")


def _content(memo: Path | None) -> str:
    if memo is None or not memo.is_file():
        return ""
    return untrusted.read_bytes(memo, "the choice of model.remat").decode(errors="replace").strip()


def _note(memo: Path | None, what: str) -> bool:
    """Whether it is kept; else the next start looks again."""
    with contextlib.suppress(OSError):
        if memo is not None:
            untrusted.write_text(memo, what)
            return True
    return False


def _memo(of: str, config: Config, mesh: Mesh, available: int | None, runs: int) -> Path | None:
    """Where the choice for a step is kept: beside the compiled programs, if these are kept."""
    folder = programs.folder()
    if not folder or jax.process_count() > 1:  # of several processes one might find what another does not
        return None
    kind = jax.devices()[0].device_kind
    key = f"{jax.__version__} {kind} {available} {dict(mesh.shape)} {runs} {config}"
    return folder / f"{of}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
