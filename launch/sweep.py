"""A sweep: python -m launch.sweep --config=configs/sweeps/ratio_mqar.py [--config.section.field=value ...]

The same command again continues: finished runs are skipped, unfinished ones resumed, failed ones listed, and
trained again with --retry. With --launcher=local it ends in report.html; the others write, and where their
client is installed submit, the job files.

Exit codes: 0 all runs finished or were handed over, 1 some did not finish, 2 bad input, 130 interrupted.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import rich

import train
from hybridlm import commands, idle, untrusted
from hybridlm.errors import ConfigError
from hybridlm.run import cli, private, show
from hybridlm.run.lock import Lock
from launch import engines, grid, local, plan
from launch.view import View

LAUNCHERS = {
    "local": "launch.local",
    "slurm": "launch.slurm",
    "skypilot": "launch.skypilot",
    "xpk": "launch.xpk",
    "wandb": "launch.wandb_sweep",
}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog=commands.called("python -m launch.sweep"), description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    result.add_argument("--config", required=True, metavar="FILE[:ARGUMENT]", help="a sweep file")
    result.add_argument("--workdir", type=Path, metavar="DIR", help="default: runs/ and the sweep's name")
    result.add_argument("--launcher", choices=LAUNCHERS, default="local", help="default: %(default)s")
    result.add_argument("--dry_run", action="store_true", help="list the runs, and exit")
    result.add_argument(
        "--device",
        default="",
        help="of the hours in --dry_run, such as H100; default: cpu, or this machine's GPU",
    )
    result.add_argument("--mfu", type=float, default=plan.MFU, help="share of its peak; default: %(default)s")
    result.add_argument("--retry", action="store_true", help="train failed runs again")
    result.add_argument("--no_submit", action="store_true", help="only write the job files")
    result.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the launcher, see docs/sweeps.md",
    )
    return result


def main(argv: Sequence[str]) -> int:
    flags, overrides = train.parse_with(parser(), argv)
    return cli.run(lambda: sweep(flags, overrides), "the same command continues")


def check(flags: argparse.Namespace) -> None:
    """ConfigError for a flag that the others leave without effect."""
    for name, default in (("device", ""), ("mfu", plan.MFU)):
        if getattr(flags, name) != default and not flags.dry_run:
            raise ConfigError(f"--{name}", getattr(flags, name), "is of the hours in --dry_run", "Add that.")
    if flags.no_submit and flags.launcher == "local":
        fix = "Name another --launcher, or list the runs with --dry_run."
        raise ConfigError("--no_submit", True, "is of job files, which the local launcher has none of", fix)
    if flags.retry and flags.launcher != "local":
        fix = "The jobs of that take up every run that is not finished."
        raise ConfigError("--retry", True, f"is of the local launcher, not of {flags.launcher}", fix)


def sweep(flags: argparse.Namespace, overrides: dict[str, str]) -> int:
    check(flags)
    console = rich.get_console()
    definition = grid.load(flags.config)
    runs = grid.runs(definition, overrides)
    for field in dict.fromkeys(field for run in runs for field in run.overrides):
        reasons = {idle.override(run.config, field) for run in runs if field in run.overrides}
        if "" not in reasons:
            show.line(f"{field} has no effect in any run: {min(reasons)}", console)
    rows = sorted({run.config.eval.batches * run.config.train.batch_size for run in runs})
    if len(rows) > 1:
        said = f"held-out losses are over eval.batches * train.batch_size rows, {rows[0]} to {rows[-1]} here"
        show.line(f"{said}: zip an axis of eval.batches with that of the batch, for the same rows", console)
    if flags.dry_run:
        plan.dry_run(runs, console, flags.device or _device(), flags.mfu)
        return 0
    workdir = _named(flags.workdir or train.default_workdir(flags.config))
    with cli.stored(workdir, "What the runs have saved is intact; the same command continues."):
        return run(runs, workdir, definition.vmap, flags)


def run(runs: list[grid.Run], workdir: Path, vmap: bool, flags: argparse.Namespace) -> int:
    """Writes the sweep down, and has it run by its launcher."""
    engine = importlib.import_module(LAUNCHERS[flags.launcher])
    settings = engines.settings(engine.Settings, flags.engine)
    with Lock(workdir):
        command = private.hide(f"python -m launch.sweep {untrusted.shell(sys.argv[1:])}")
        plan.write(runs, workdir, {"command": command})
        if flags.launcher == "local":
            return 1 if run_local(runs, workdir, vmap, settings, flags) else 0
        hand_over(engine, local.jobs(runs, workdir, vmap), workdir, settings, flags.no_submit)
    return 0


def _named(workdir: Path) -> Path:
    """``workdir`` as other programs can be given it: text, and no flag. ConfigError where it is not UTF-8."""
    try:
        str(workdir.absolute()).encode()
    except UnicodeEncodeError:
        raise ConfigError("--workdir", str(workdir), "is not UTF-8", "Give another.") from None
    return workdir.absolute() if str(workdir).startswith("-") else workdir


def hand_over(engine: Any, jobs: list[local.Job], workdir: Path, settings: Any, only_write: bool) -> None:
    """Writes the engine's files and, where its client is here, submits them."""
    for path in engine.write(jobs, workdir, settings):
        show.line(private.shown(f"written: {path}"))
    reason = "--no_submit" if only_write else engine.missing(settings)
    if reason:
        show.line(private.shown(f"not submitted: {reason}"))
        return
    for name in engine.submit(jobs, workdir, settings):
        show.line(private.shown(f"submitted: {name}"))


def run_local(
    runs: list[grid.Run], workdir: Path, vmap: bool, settings: local.Settings, flags: argparse.Namespace
) -> int:
    """Runs what is left on this machine and writes the report; how many runs did not finish."""
    console = rich.get_console()
    view = View(runs, workdir, console)
    wanted = ("queued", "failed") if flags.retry else ("queued",)
    ready = [run for run in runs if view.states[run.name].state in wanted]
    found = local.devices()
    jobs = local.jobs(ready, workdir, vmap)
    per_device = settings.jobs or local.fitting(jobs, found)
    view.say(f"{len(runs)} runs in {workdir}: {view.summary()}; {len(jobs)} to start")
    if jobs:
        view.say(f"{per_device} at a time on each of {len(found)} devices")
    with view.live or contextlib.nullcontext():
        local.run_all(jobs, found, per_device, view.show, settings.seconds or float("inf"))
    failed = [run for run in runs if view.states[run.name].state == "failed"]
    for run in failed:
        view.say(f"failed: {run.name}: {view.states[run.name].error}")
    if failed:
        view.say("The same command with --retry trains them again.")
    from launch import report  # brings in matplotlib

    view.say(f"written: {report.write(workdir)}")
    return sum(state.state != "finished" for state in view.states.values())


def _device() -> str:
    found = local.devices()
    return plan.CPU if found[0].gpu is None else "H100"


if __name__ == "__main__":
    private.plain_log()
    jax.config.update("jax_platforms", "cpu")  # accelerators belong to the workers
    sys.exit(main(sys.argv[1:]))
