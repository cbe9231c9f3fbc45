"""The rows of docs/step.md's tables, and first steps without a cache, on one GPU.

    export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
    python -m benchmarks.step_rows [--rows=340m-full,1.3b-full] [--jobs=8] [--steps=8]
    python -m benchmarks.step_rows --first=340m-kda,1.3b-kda

Rows are measured as by `benchmarks.train_step --backends=auto`: all compiled side by side, then each timed
alone, its program found in the cache, so that its first_step_s is none. --first: instead the first step of
these rows, one process after the other, without a cache, with each value of train.xla_triton. A line of JSON
a row; "groups_ms": of one more step, by kind of kernel. Other fields: --config.section.field=value.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from benchmarks import gpu_profile, jobs
from benchmarks.train_step import measure, random_batch
from hybridlm import config as configs

HEADS = {
    f"mixers.gdn.{field}": size for field, size in (("num_heads", 16), ("head_dim", 128), ("v_head_dim", 128))
}
JLA = {"train.batch_size": 16, "train.microbatches": 0, "model.vocab_size": 128256, "model.mlp_hidden": 5632}
JLA_KDA = JLA | {"mixers.kda.num_heads": 16, "mixers.kda.head_dim": 128}
DOTS = {"train.microbatches": 4, "model.remat": "dots", "model.scan": False}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {  # argument of configs/hybrid.py, fields; 8 rows of 4,096
    "340m-kda": ("340m,kda,3:1", {}),
    "340m-full": ("340m,full", {}),
    "1.3b-kda": ("1.3b,kda,3:1", {"train.microbatches": 2}),
    "1.3b-full": ("1.3b,full", {"train.microbatches": 2}),
    "1.3b-gdn": ("1.3b,gdn,3:1", {"train.microbatches": 2} | HEADS),
    "340m-65536": ("340m,kda,3:1", {"train.batch_size": 1, "train.seq_len": 65536}),
    "jla-gdn": ("1.3b,gdn,pure", JLA | HEADS),
    "jla-kda": ("1.3b,kda,pure", JLA_KDA),
    "jla-gdn-dots": ("1.3b,gdn,pure", JLA | HEADS | DOTS),
    "jla-kda-dots": ("1.3b,kda,pure", JLA_KDA | DOTS),
}
FIXED = {"train.batch_size": 8, "train.seq_len": 4096, "mesh.data": 1, "mesh.fsdp": 1}


def resolved(name: str, given: dict[str, str]) -> configs.Config:
    """The config of a row, with other fields as on a command line."""
    argument, own = ROWS[name]
    fields = {field: str(value) for field, value in (FIXED | own).items()} | given
    return configs.resolve(configs.load(f"configs/hybrid.py:{argument}", fields))


def row(name: str, steps: int, given: dict[str, str], alone: bool) -> dict[str, Any]:
    """What `measure` finds in this process, and what groups of kernels take."""
    config = resolved(name, given)
    batch = random_batch(config.train.batch_size, config.train.seq_len, config.model.vocab_size)
    groups: dict[str, float] = {}
    look = None if alone else lambda run: groups.update(gpu_profile.groups(gpu_profile.kernels(run)))
    found = measure(config, batch, steps, look, None if alone else jobs.wait)
    return found | {"groups_ms": groups}


def main() -> int:
    """Exit code: 1 if a row has no figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--first", help="rows, in place of the others")
    parser.add_argument("--jobs", type=int, default=8, help="that compile side by side")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--row", help=argparse.SUPPRESS)  # be this one
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    given = dict(field.removeprefix("--config.").split("=", 1) for field in rest)
    if args.row:
        print(json.dumps(row(args.row, args.steps, given, args.alone)), flush=True)
        return 0
    command = lambda name: ["-m", "benchmarks.step_rows", f"--row={name}", f"--steps={args.steps}", *rest]
    if not args.first:
        commands = {name: command(name) for name in args.rows.split(",")}
        found = jobs.run(commands, args.jobs, (False, True), waiting=1)
        return int(any("error" in one for one in found.values()))
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    failed = 0
    for name in args.first.split(","):
        for triton in ("all", "products", "norms", "none"):
            print(json.dumps({"name": name, "train.xla_triton": triton}), flush=True)
            more = ["--alone", f"--config.train.xla_triton={triton}"]
            failed |= subprocess.run([sys.executable, *command(name), *more], env=env, check=False).returncode
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
