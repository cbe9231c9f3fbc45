"""A training step on 1, 2, 4 and 8 devices of one host, over several meshes, in one process.

    python -m benchmarks.scaling --config=configs/hybrid.py:1.3b,kda,3:1 [--batch_size=4] [--seq_len=4096] \
        [--devices=1,2,4,8] [--meshes=data,fsdp,fsdp+tensor,fsdp+context] [--steps=8] [--check=3] \
        [--config.section.field=value ...]

batch_size is that of one device: every mesh of n devices trains on the same n * batch_size rows of random
tokens that lie in memory, but the mesh `context`, whose rows are n times as long. The second axis of a mesh
has 2 devices. Prints a JSON line a mesh, and a table:

    of linear      tokens/s over n times those of one device
    planned, peak  GiB of a device: what the compiler says that the step holds; what the allocator held at
                   most since the process began, which is a mesh's where it is the largest so far
    communication  share of collectives in the time of all ops of one step (`hybridlm.run.profile`), whether
                   hidden behind others or not
    loss           largest relative difference, over --check steps, from one device that accumulates the rows

A mesh that does not fit has its error in the place of figures. Without GPUs, to see that it works:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python -m benchmarks.scaling ...
"""

import argparse
import gc
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.train_step import measure, random_batch
from hybridlm import config as configs
from hybridlm.config import Config
from hybridlm.run import profile

COLLECTIVES = re.compile(r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|nccl", re.I)
Row = dict[str, Any]


def sizes(mesh: str, devices: int) -> dict[str, int] | None:
    """Of all mesh axes, for "fsdp" or "fsdp+tensor"; None where there is no such mesh of so many devices."""
    first, _, second = mesh.partition("+")
    found = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    if not second:
        return found | {first: devices}
    return None if devices % 2 else found | {first: devices // 2, second: 2}


def communication(run: Callable[[], Any]) -> float:
    """The share of collectives in the time of the ops of what ``run`` runs."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        [trace] = Path(folder).rglob("*.xplane.pb")
        _, ops = profile.read(trace)
    return sum(op.ms for op in ops if COLLECTIVES.search(op.name)) / (sum(op.ms for op in ops) or 1.0)


def on_mesh(config: Config, mesh: str, devices: int, rows: int, steps: int) -> Row:
    """``measure`` with ``rows`` rows a device, and the communication's share."""
    axes = sizes(mesh, devices) or {}
    rows, longer = (rows, devices) if mesh == "context" else (rows * devices, 1)
    config = config.replace(
        train__batch_size=rows,
        train__seq_len=longer * config.train.seq_len,
        **{f"mesh__{axis}": size for axis, size in axes.items()},
    )
    configs.check_batch(config.train, axes)
    shares: list[float] = []
    batch = random_batch(rows, config.train.seq_len, config.model.vocab_size)
    found = measure(config, batch, steps, lambda run: shares.append(communication(run)))
    return found | {"communication": shares[0]}


def alone(config: Config, devices: int, rows: int, steps: int) -> list[float]:
    """Losses of one device that accumulates what ``devices`` devices train on."""
    config = config.replace(
        train__batch_size=rows * devices, train__microbatches=devices * config.train.microbatches,
        mesh__data=1, mesh__fsdp=1, mesh__tensor=1, mesh__context=1,
    )  # fmt: skip
    batch = random_batch(rows * devices, config.train.seq_len, config.model.vocab_size)
    return measure(config, batch, steps - 1)["losses"]


def attempt(what: Callable[[], Any]) -> Any:
    """What it returns, or {"error": the first line of what XLA said}; memory is free again after it."""
    try:
        return what()
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).splitlines()[0][:120]}
    finally:
        gc.collect()


def compare(
    config: Config, devices: Sequence[int], meshes: Sequence[str], *, rows: int, steps: int, check: int
) -> list[Row]:
    """A row for each mesh of each number of devices; the first is of one device."""
    found: list[Row] = []
    speed = float("nan")
    for count in [1, *(one for one in devices if one > 1)]:
        expected = [] if count == 1 or not check else attempt(lambda n=count: alone(config, n, rows, check))
        for mesh in ["data"] if count == 1 else meshes:
            if sizes(mesh, count) is None:
                continue
            row = {"mesh": mesh if count > 1 else "one", "devices": count}
            row |= attempt(lambda m=mesh, n=count: on_mesh(config, m, n, rows, max(steps, check)))
            if count == 1:
                speed = row.get("tokens_per_second", speed)
            if "error" not in row:
                row["of_linear"] = row["tokens_per_second"] / (speed * count)
            if expected and mesh != "context" and "error" not in {*row, *expected}:
                pairs = list(zip(row["losses"], expected, strict=False))
                row["loss_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
            print(json.dumps(row), flush=True)
            found.append(row)
    return found


def table(rows: Sequence[Row]) -> str:
    heads = "mesh", "devices", "tokens/s", "of linear", "MFU", "planned", "peak", "communication", "loss"
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["mesh"], str(row["devices"])]
        if "error" in row:
            cells += [row["error"], *[""] * (len(heads) - 3)]
        else:
            cells += [f"{row['tokens_per_second']:,.0f}", f"{row['of_linear']:.1%}", f"{row['mfu']:.1%}"]
            cells += [f"{row['planned_gib']:.2f} GiB", f"{row['peak_gib']:.2f} GiB"]
            cells += [f"{row['communication']:.1%}"]
            cells += [f"{row['loss_difference']:.1e}" if "loss_difference" in row else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch_size", type=int, default=4, help="rows of one device")
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--devices", default="1,2,4,8")
    parser.add_argument("--meshes", default="data,fsdp,fsdp+tensor,fsdp+context")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--check", type=int, default=3, help="steps whose losses are compared; 0: none")
    args, rest = parser.parse_known_args()
    overrides = dict(field.removeprefix("--config.").split("=", 1) for field in rest)
    overrides |= {"train.seq_len": str(args.seq_len), "train.batch_size": str(args.batch_size)}
    config = configs.resolve(configs.load(args.config, {"mesh.data": "1", "mesh.fsdp": "1"} | overrides))
    devices = [int(count) for count in args.devices.split(",")]
    if max(devices) > jax.device_count():
        parser.error(f"--devices={args.devices}: there are {jax.device_count()}")
    rows = compare(
        config, devices, args.meshes.split(","), rows=args.batch_size, steps=args.steps, check=args.check
    )
    said = f"{args.batch_size} x {args.seq_len} tokens a device, {jax.devices()[0].device_kind}"
    print(f"\n{args.config}, {said}, jax {jax.__version__}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
