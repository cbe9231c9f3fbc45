"""Evaluates a run: python -m eval --workdir=runs/x --suite=recall

Writes eval.json and eval.png into the workdir and the same numbers to W&B if the run has it; a second call
goes on where the first was stopped. With --ema all of it is of the average of the weights, in workdir/ema.
Exit codes: 0 done, 1 a run that cannot be read, 2 bad input, 130 interrupted.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from eval import curves, haystack, report, runner, subject, tasks
from eval.tasks import natural
from hybridlm import commands, sharding, untrusted
from hybridlm.errors import ConfigError, RunError
from hybridlm.run import cli, private, tracking

log = logging.getLogger("hybridlm")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=commands.called("python -m eval"), allow_abbrev=False)
    add = parser.add_argument
    add("--workdir", metavar="DIR", help="of the run; train.py wrote it")
    add("--suite", default="", help="one of " + ", ".join(tasks.SUITES))
    add("--tasks", default="", metavar="NAME,...", help="further tasks; --list describes them")
    add("--list", action="store_true", help="every task with the source of its definition, and exit")
    add("--lengths", default="", metavar="N,...", help="contexts in tokens; default: each task's own")
    add("--samples", type=int, default=100, help="of each task and length (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    add("--step", type=int, help="of the checkpoint (default: the newest)")
    add("--ema", action="store_true", help="the average of the weights (optimizer.ema)")
    add(
        "--haystack",
        default=haystack.DEFAULT,
        metavar="FILE",
        help="prose to hide in (default: Python's docs)",
    )
    add(
        "--data_dir",
        default="",
        metavar="DIR",
        help="local <task>.jsonl of the natural suite; default: download",
    )
    add(
        "--tokenizer", default="", metavar="FILE", help='"bytes" or a tokenizer.json; default: the run\'s own'
    )
    add("--batch_tokens", type=int, default=1 << 15, help="tokens of a batch (default: %(default)s)")
    add("--context", type=int, default=1, metavar="N", help="devices that share the cache of a long context")
    return parser.parse_args(argv)


def plan(flags: argparse.Namespace) -> runner.Plan:
    for name, least in (("samples", 1), ("batch_tokens", 1), ("seed", 0)):
        if getattr(flags, name) < least:
            raise ConfigError(f"--{name}", getattr(flags, name), f"must be at least {least}")
    try:
        lengths = tuple(int(part) for part in flags.lengths.split(",") if part.strip())
        if any(length < 1 for length in lengths):
            raise ValueError
    except ValueError:
        raise ConfigError("--lengths", flags.lengths, "must be whole numbers like 1024,2048") from None
    one = tasks.Setting(0, flags.samples, flags.seed, haystack.load(flags.haystack), flags.data_dir)
    return runner.Plan(lengths, one)


def listing() -> str:
    """A line for each task."""
    every = list(tasks.TASKS.values())
    name, about = (max(len(getattr(task, field)) for task in every) for field in ("name", "about"))
    return "\n".join(f"{task.name:{name}}  {task.about:{about}}  {task.source}" for task in every)


def evaluate(flags: argparse.Namespace, console: Console) -> None:
    chosen = tasks.choose(flags.suite, [name for name in flags.tasks.split(",") if name])
    wanted = plan(flags)
    if flags.data_dir and not any(isinstance(task, natural.NaturalTask) for task in chosen):
        raise ConfigError("--data_dir", flags.data_dir, "is read by none of these tasks", "Leave it out.")
    if not flags.workdir:
        raise ConfigError("--workdir", "", "must name the run to evaluate")
    workdir = Path(flags.workdir)
    folder = runner.folder(workdir, flags.ema)
    runner.read(folder / "eval.json")  # a damaged one is refused before anything is loaded
    tested = subject.load(workdir, flags.step, flags.tokenizer, flags.batch_tokens, flags.ema)
    runner.check_writable(folder)
    known = runner.taken_up(folder, tested)
    name = Path(private.hide(str(workdir.resolve()))).name
    title = f"{name} at step {tested.step:,}" + (", average of the weights" if flags.ema else "")
    about = {"run": name, "step": tested.step, "pattern": tested.config.model.pattern}
    learnt = curves.convergence(workdir, tested.config)
    about["convergence"] = {what: one._asdict() for what, one in learnt.items()}
    about["haystack"] = wanted.one.haystack.name
    keep = lambda own: runner.kept(folder, tested, own, about)
    if known != runner.read(folder / "eval.json"):
        keep({})
    with progress(console) as bars:
        watch = watcher(bars, runner.missing(tested, chosen, wanted, known))
        results = runner.measure(tested, chosen, wanted, known, watch=watch, done=keep)
    names = {task.name for task in chosen}
    shown = {name: result for name, result in results.items() if result["task"] in names}
    if not shown:
        raise RunError("nothing could be measured; the warnings above say why.")
    console.print(report.table(shown, title))
    for line in (*report.turns(shown), *(f"{what} while training: {one}" for what, one in learnt.items())):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    report.plot(runner.known_of(folder, tested), title, folder / "eval.png")  # and another evaluation's
    tracker = tracking.Wandb(workdir, tested.config, tested.config.log.wandb_mode)
    prefix = "ema/" if flags.ema else ""
    tracker.log(tested.step, {prefix + key: value for key, value in runner.metrics(shown.items()).items()})
    tracker.close(failed=False)
    for file in ("eval.json", "eval.png"):
        shown_path = untrusted.terminal(private.hide(str(folder / file)))
        console.print(f"wrote {shown_path}", markup=False, highlight=False, soft_wrap=True)


def progress(console: Console) -> Bars:
    name, share = TextColumn("{task.description}", markup=False), TextColumn("{task.percentage:>3.0f}%")
    clocks = (TimeElapsedColumn(), TimeRemainingColumn())
    return Bars(name, BarColumn(), share, *clocks, console=console, transient=True)


def watcher(bars: Bars, todo: Sequence[tuple[tasks.Task, tasks.Setting]]) -> runner.Watch:
    """A bar for each measurement, and one over all that knows the end: its unit is tokens of contexts."""
    weight = {runner.name_of(task, setting): max(setting.length, 1) for task, setting in todo}
    tokens = sum(weight[runner.name_of(task, setting)] * setting.samples for task, setting in todo)
    whole = bars.add_task("all", total=tokens)
    ended = [0.0]  # tokens of the measurements that were begun before

    def watch(name: str, samples: int) -> subject.Progress:
        for earlier in bars.tasks:
            if earlier.id != whole:
                bars.remove_task(earlier.id)
        bars.update(whole, completed=ended[0])  # one that was left out, or had fewer samples, is over too
        ended[0] += weight[name] * samples
        bar = bars.add_task(name, total=samples)

        def advance(done: int) -> None:
            bars.advance(bar, done)
            bars.advance(whole, done * weight[name])

        return advance

    return watch


def main(argv: Sequence[str]) -> int:
    flags = parse(argv)
    console = Console()
    handler = RichHandler(console=console, show_path=False)
    logging.basicConfig(format="%(message)s", handlers=[handler], force=__name__ == "__main__")
    log.setLevel(logging.INFO)
    if flags.list:
        print(listing())
        return 0

    def body() -> None:
        with sharding.sequences_over(flags.context):
            evaluate(flags, console)

    return cli.run(body, "what was measured is kept, the same command continues")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
