"""python -m hybridlm.convert import --hf=DIR --workdir=runs/x
python -m hybridlm.convert export --workdir=runs/x --hf=DIR [--model_type=...] [--dtype=BF16] [--step=N]
python -m hybridlm.convert logits --workdir=runs/x --ids=ids.npy --out=logits.npy
python -m hybridlm.convert upgrade --workdir=runs/x      checkpoints of hybridlm 0.1.0
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hybridlm import cost, report
from hybridlm.commands import called
from hybridlm.convert import evaluate, incoming, outgoing, upgrade
from hybridlm.run import cli


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=called("python -m hybridlm.convert"), description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    flags = {
        "import": {"hf": "folder with config.json and safetensors", "workdir": "the run to make"},
        "export": {"workdir": "the run", "hf": "folder to make"},
        "logits": {
            "workdir": "the run",
            "ids": "int .npy of token ids [B, T]",
            "out": "float32 .npy [B, T, V]",
        },
        "upgrade": {"workdir": "the run, written by hybridlm 0.1.0"},
    }
    for command, names in flags.items():
        added = commands.add_parser(command, allow_abbrev=False)
        for name, text in names.items():
            added.add_argument(f"--{name}", required=True, help=text)
        if command == "export":
            added.add_argument("--model_type", default="", help="default: that of the import, else what fits")
            added.add_argument("--dtype", default="", help="F32, BF16 or F16; default: as imported, else F32")
        if command in ("export", "logits"):
            added.add_argument("--step", type=int, help="default: the newest checkpoint")
            added.add_argument(
                "--ema", action="store_true", help="the average of the weights (optimizer.ema)"
            )
    given = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", force=__name__ == "__main__")
    return cli.run(lambda: convert(given))


def convert(given: argparse.Namespace) -> None:
    if given.command == "import":
        config = incoming.import_hf(given.hf, given.workdir)
        console = Console()
        console.print(report.layer_table(config))
        console.print(f"{cost.parameters(config):,} parameters in {given.workdir}", highlight=False)
    elif given.command == "export":
        args = (given.workdir, given.hf, given.model_type, given.dtype, given.step, given.ema)
        print(f"{outgoing.export_hf(*args)} checkpoint in {given.hf}")
    elif given.command == "upgrade":
        steps = ", ".join(map(str, upgrade.upgrade(given.workdir)))
        print(f"upgraded the checkpoints at steps {steps}; the old ones are in {upgrade.OLD}")
    else:
        evaluate.save_logits(Path(given.workdir), Path(given.ids), Path(given.out), given.step, given.ema)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
