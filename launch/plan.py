"""What a sweep amounts to before it runs: a row for each run, and the hours on a device."""

import functools
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from eval import tasks
from eval.tasks import labelled
from hybridlm import config as configs
from hybridlm import cost, stages, untrusted
from hybridlm.errors import ConfigError, nearest
from hybridlm.report import quantity
from hybridlm.run import checkpoint, private, show
from launch.grid import Run
from launch.state import POINT

log = logging.getLogger("hybridlm")

MFU = 0.25  # of the peak: what the 340M hybrid of docs/step.md reaches on an H100; small models less
CPU = "cpu"


class Facts(NamedTuple):
    """full_layers: indices.  state_bytes, cache_bytes: of decoding one sequence of ``seq_len`` tokens.
    flops: of the whole training run.
    """

    full_layers: list[int]
    num_layers: int
    parameters: int
    state_bytes: int
    cache_bytes: int
    seq_len: int
    tokens: int
    flops: float


def facts(runs: Sequence[Run]) -> dict[str, Facts]:
    """Run name -> `Facts`; runs of the same model are counted once."""
    known: dict[str, Facts] = {}
    result = {}
    for run in runs:
        config = run.config
        key = repr((config.model, config.mixers, config.mlps, config.train.seq_len))
        if key not in known:
            summary = cost.summary(config)
            sizes = {name: summary[name] for name in Facts._fields if name in summary}
            known[key] = Facts(**sizes, tokens=1, flops=cost.train_flops_per_token(config))
        tokens = stages.tokens(stages.parts(config, configs.resolve))
        result[run.name] = known[key]._replace(tokens=tokens, flops=known[key].flops * tokens)
    return result


def hours(flops: float, device: str, mfu: float) -> float:
    """Hours of ``flops`` at ``mfu`` of one device's peak. device: a name in `cost.PEAK_FLOPS`, or "cpu"."""
    peak = cpu_flops() if device == CPU else cost.PEAK_FLOPS.get(device)
    if peak is None:
        known = (*cost.PEAK_FLOPS, CPU)
        raise ConfigError("--device", device, "has no known peak", nearest(device, known))
    return flops / (peak * mfu) / 3600


@functools.cache  # runs of as many FLOPs take as many hours
def cpu_flops(size: int = 1024, seconds: float = 0.2) -> float:
    """FLOP/s of float32 matrix products on this machine's CPU, measured."""
    cpu = jax.local_devices(backend="cpu")[0]
    x = jax.device_put(jax.numpy.ones((size, size)), cpu)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        product(x).block_until_ready()
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - began)


def table(runs: Sequence[Run], known: dict[str, Facts], device: str, mfu: float) -> Table:
    """A row for each run; bytes are those of one sequence of train.seq_len tokens."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("run", no_wrap=True)
    result.add_column("full layers, counted from 0", overflow="fold")
    for column in ("parameters", "state", "KV cache", "tokens", "FLOPs", f"hours, {device}"):
        result.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        f = known[run.name]
        count = len(f.full_layers)
        shown = "all" if count == f.num_layers else ", ".join(map(str, f.full_layers)) or "none"
        result.add_row(
            run.name, f"{count} of {f.num_layers}: {shown}", f"{f.parameters:,}",
            quantity(f.state_bytes, "B"), quantity(f.cache_bytes, "B"), quantity(f.tokens, ""),
            quantity(f.flops, ""), f"{hours(f.flops, device, mfu):.3g}",
        )  # fmt: skip
    return result


def dry_run(runs: Sequence[Run], console: Console, device: str, mfu: float) -> None:
    known = facts(runs)
    wide = console if console.is_terminal else Console(width=160)  # full layers are what must not be cut
    wide.print(table(runs, known, device, mfu))
    total = hours(sum(f.flops for f in known.values()), device, mfu)
    sizes = [f.parameters for f in known.values()]
    spread = max(sizes) / min(sizes) - 1
    say = lambda text: show.line(text, console)
    tokens, states = sum(f.tokens for f in known.values()), [f.state_bytes for f in known.values()]
    say(f"{len(runs)} runs, {quantity(tokens, '')} tokens")
    say(f"estimate: {total:,.3g} hours of one {device}, at {mfu:.0%} of its peak")
    say(f"parameters: {min(sizes):,} to {max(sizes):,}, {spread:.1%} apart")
    say(f"states: {quantity(min(states), 'B')} to {quantity(max(states), 'B')}, which are not matched")


def guess(config: configs.Config) -> dict[str, float | None]:
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


def write(runs: Sequence[Run], workdir: Path, record: dict[str, Any]) -> None:
    """sweep.json, and point.json in a folder for each run. ConfigError for a folder of another run."""
    known = facts(runs)
    for run in runs:
        path = workdir / run.name / POINT
        if (workdir / run.name).exists() and not (workdir / run.name).is_dir():
            raise ConfigError("axes", run.name, f"a run cannot have this name, {workdir} has a file of it")
        old, new = _written(path), untrusted.parse(configs.to_json(run.config))
        if changed := checkpoint.changes(new if old is None else old, new):
            name, (before, after) = next(iter(changed.items()))
            problem = f"has a run {run.name!r} with another config: {name}: {before!r} -> {after!r}"
            raise ConfigError("--workdir", str(workdir), problem, "Give another --workdir.")
    for run in runs:
        folder = workdir / run.name
        folder.mkdir(parents=True, exist_ok=True)
        untrusted.write_text(folder / POINT, configs.to_json(run.config))
    listed = [
        {
            "name": run.name,
            "point": run.point,
            "command": [private.hide(word) for word in run.command()],
            "steps": run.config.train.steps,
            "parts": stages.parts(run.config, configs.resolve),
            "learning_rate": run.config.optimizer.learning_rate,
            "width": run.config.model.d_model,
            "guess": guess(run.config),
            **known[run.name]._asdict(),
        }
        for run in runs
    ]
    untrusted.write_json(workdir / "sweep.json", record | {"runs": listed})


def _written(path: Path) -> Any:
    """The config that an earlier start of the sweep left; None without one.

    A file that cannot be read is written anew: whether its run is another one a checkpoint says as well.
    """
    if not path.exists():
        return None
    try:
        return untrusted.read_json(path, POINT, dict)
    except ConfigError as error:
        log.warning("%s; written anew", error)
        return None
