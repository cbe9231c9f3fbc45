"""Train a language model: python train.py --config=configs/quickstart.py [--config.section.field=value ...]

Exit codes: 0 finished run (or dry run), 1 a run that could not go on, 2 bad input, 3 stopped as asked with a
complete checkpoint (start again with --resume=auto), 130 or 143 ended at once by SIGINT or SIGTERM.
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import rich
from rich.logging import RichHandler

from eval import in_loop
from hybridlm import commands, config_file, idle, report, trainer
from hybridlm import config as configs
from hybridlm.errors import ConfigError
from hybridlm.run import cli, private, processes

log = logging.getLogger("hybridlm")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags, and the overrides: dotted field -> text of every --config.<field>=<text>."""
    parser = argparse.ArgumentParser(
        prog=commands.called("python train.py"), description="Train a language model.", allow_abbrev=False,
        epilog="--config.<section>.<field>=<value> overrides any field of the config, last one wins.",
    )  # fmt: skip
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARGUMENT]", help="config file, or a config.json"
    )
    parser.add_argument("--workdir", metavar="DIR", help="default: runs/ and the config's name")
    parser.add_argument(
        "--resume", choices=("auto", "never", "must"), default="auto", help="default: %(default)s"
    )
    parser.add_argument(
        "--distributed", metavar="auto|HOST:PORT,COUNT,INDEX", help="be one of several processes of a run"
    )
    parser.add_argument("--dry_run", action="store_true", help="print what the config amounts to, and exit")
    parser.add_argument(
        "--devices", default="", metavar="h100:N", help="of --dry_run: compile the step for GPUs not there"
    )
    return parse_with(parser, argv)


def parse_with(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The parser's flags, and the overrides."""
    flags: list[str] = []
    overrides: dict[str, str] = {}
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            flags.append(argument)
            continue
        field, equals, text = argument.removeprefix("--config.").partition("=")
        value = text if equals else next(arguments, None)
        if value is None:
            parser.error(f"--config.{field} needs a value: --config.{field}=<value>")
        overrides[field] = value
    return parser.parse_args(flags), overrides


def default_workdir(spec: str) -> Path:
    """configs/hybrid.py:340m,kda,3:1 -> runs/hybrid-340m-kda-3-1; a sweep's x/kda/point.json -> x/kda"""
    filename, argument = config_file.split(spec)
    if Path(filename).name == "point.json":
        return Path(filename).parent
    return Path("runs") / re.sub(r"\W+", "-", f"{Path(filename).stem} {argument}").strip("-")


def main(argv: Sequence[str]) -> int:
    flags, overrides = parse(argv)
    # Of its GPUs' memory; XLA would take 0.75. Who lets several runs share a GPU says less (launch/local.py).
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    return cli.run(lambda: train(flags, overrides), "training had not begun")


def train(flags: argparse.Namespace, overrides: dict[str, str]) -> None:
    if flags.distributed:
        processes.join(flags.distributed)
    config = configs.resolve(configs.load(flags.config, overrides))
    for field in overrides:
        if why := idle.override(config, field):
            log.warning("--config.%s has no effect: %s", field, why)
    if why := idle.ranking(config):
        log.warning("checkpoint.keep_best = %d: %s", config.checkpoint.keep_best, why)
    if flags.devices and not flags.dry_run:
        raise ConfigError("--devices", flags.devices, "names GPUs that are not there", "Add --dry_run.")
    if flags.dry_run:
        trainer.say_unwarmed(config)
        report.dry_run(config, rich.get_console(), flags.devices)
        return
    workdir = Path(flags.workdir or default_workdir(flags.config))
    trainer.train(config, workdir, flags.resume, in_loop.build(config))


if __name__ == "__main__":
    console = rich.get_console()  # the progress bar's: lines of the log appear above it
    handler = RichHandler(console=console, show_time=False, show_path=False)
    handler.addFilter(private.log_filter)
    logging.basicConfig(format="%(message)s", handlers=[handler], force=True)
    log.setLevel(logging.INFO)
    sys.exit(main(sys.argv[1:]))
