"""Any task of lm-evaluation-harness on a run: python -m eval.harness --workdir=runs/x --tasks=lambada_openai

Writes harness.json into the workdir (with --ema into workdir/ema). From Python: `eval.harnessed.HybridLM` is
an LM of the harness.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from eval import runner, subject
from hybridlm import commands, untrusted
from hybridlm.errors import ConfigError
from hybridlm.run import cli, private


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=commands.called("python -m eval.harness"), allow_abbrev=False)
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--tasks", required=True, metavar="NAME,...")
    parser.add_argument("--num_fewshot", type=int)
    parser.add_argument("--limit", type=int, help="samples of each task")
    parser.add_argument("--max_length", type=int, default=0, help="of a context (default: train.seq_len)")
    parser.add_argument("--include_path", metavar="DIR", help="further tasks, yaml")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="the average of the weights (optimizer.ema)")
    parser.add_argument("--tokenizer", default="", metavar="FILE", help="default: the run's own")
    parser.add_argument("--batch_tokens", type=int, default=1 << 15)
    return parser.parse_args(argv)


def library() -> ModuleType:
    """`eval.harnessed`, ConfigError without the package that it needs."""
    try:
        from eval import harnessed
    except ImportError as error:
        fix = "pip install 'hybridlm[eval]'."
        lacks = f"needs the package {error.name}"
        raise ConfigError("--tasks", "lm-evaluation-harness", lacks, fix) from error
    return harnessed


def harness(flags: argparse.Namespace) -> None:
    for name in ("max_length", "num_fewshot"):
        if (getattr(flags, name) or 0) < 0:
            raise ConfigError(f"--{name}", getattr(flags, name), "must not be negative")
    for name in ("limit", "batch_tokens"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise ConfigError(f"--{name}", getattr(flags, name), "must be at least 1")
    harnessed = library()
    tested = subject.load(flags.workdir, flags.step, flags.tokenizer, flags.batch_tokens, flags.ema)
    folder = runner.folder(flags.workdir, flags.ema)
    runner.check_writable(folder)
    results = harnessed.evaluate(
        tested, [name for name in flags.tasks.split(",") if name], max_length=flags.max_length,
        num_fewshot=flags.num_fewshot, limit=flags.limit, include_path=flags.include_path,
    )  # fmt: skip
    print(harnessed.utils.make_table(results))
    path = folder / "harness.json"
    kept = {name: results[name] for name in ("results", "versions", "n-samples")}
    runner.put(path, lambda: untrusted.write_json(path, plain({"step": tested.step, **kept})))
    print(f"wrote {untrusted.terminal(private.hide(str(path)))}")


def plain(value: Any) -> Any:
    """What JSON has a word for: numbers that are not finite are null, what it does not know is its text."""
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    try:
        json.dumps(value)
    except TypeError:
        return private.hide(str(value))
    return value


def main(argv: Sequence[str]) -> int:
    flags = parse(argv)
    logging.basicConfig(format="%(message)s", force=__name__ == "__main__")
    return cli.run(lambda: harness(flags))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
