"""A training step on 1, 2, 4 and 8 devices of one host, over several meshes.

    python -m benchmarks.scaling --config=configs/hybrid.py:1.3b,kda,3:1 [--batch_size=4] [--seq_len=4096] \
        [--devices=1,2,4,8] [--meshes=data,fsdp,fsdp+tensor,fsdp+context] [--steps=8] [--check=3] \
        [--jobs=16 [--stages=compile,time]] [--config.section.field=value ...]

batch_size is that of one device: every mesh of n devices trains on the same n * batch_size rows of random
tokens that lie in memory, but the mesh `context`, whose rows are n times as long. The second axis of a mesh
has 2 devices. Prints a JSON line a mesh, and a table:

    of linear      tokens/s over n times those of one device
    planned, peak  GiB of a device: what the compiler says that the step holds; what the allocator held at
                   most since the process began
    communication  share of one step's time in which GPUs exchange, and in which they do nothing else
                   (elsewhere: share of collectives in the time of all ops)
    loss           largest relative difference, over --check steps, from one device that accumulates the rows

A mesh that does not fit has its error in the place of figures. With --jobs every mesh has a process of its
own: so many at a time compile, into a cache that they share, and then each is timed alone, the others
waiting with nothing on the devices (those of other runs of this script too). With $JAX_COMPILATION_CACHE_DIR
the stages can be runs of their own. Without GPUs, to see that it works:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python -m benchmarks.scaling ...
"""

import argparse
import gc
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import jobs
from benchmarks.train_step import measure, random_batch
from hybridlm import config as configs
from hybridlm.config import Config
from hybridlm.run import profile

COLLECTIVES = re.compile(r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|nccl", re.I)
ALONE = "alone"  # one device that accumulates what n train on
Row = dict[str, Any]
Key = tuple[str, int]  # a mesh, and its devices


def sizes(mesh: str, devices: int) -> dict[str, int] | None:
    """Of all mesh axes, for "fsdp" or "fsdp+tensor"; None where there is no such mesh of so many devices."""
    first, _, second = mesh.partition("+")
    found = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    if not second:
        return found | {first: devices}
    return None if devices % 2 else found | {first: devices // 2, second: 2}


def keys(devices: Sequence[int], meshes: Sequence[str], check: int) -> list[Key]:
    """What is measured, in order; the first is one device."""
    found = [("data", 1)]
    for count in (one for one in devices if one > 1):
        found += [(ALONE, count)] * bool(check)
        found += [(mesh, count) for mesh in meshes if sizes(mesh, count)]
    return found


def communication(run: Callable[[], Any]) -> Row:
    """Of what ``run`` runs, on the first GPU: the shares of its time in which it exchanges, and in which it
    does nothing else; how often and how long, in ms, by kernel. Elsewhere collectives' share in all ops.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        [trace] = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        gpu = next((plane for plane in planes if plane.name.startswith("/device:GPU")), None)
        if gpu is None:
            _, ops = profile.read(trace)
            share = sum(op.ms for op in ops if COLLECTIVES.search(op.name))
            return {"communication": share / (sum(op.ms for op in ops) or 1.0), "exposed": float("nan")}
        kernels = [
            (event.start_ns, event.start_ns + event.duration_ns, event.name.split("(")[0])
            for line in gpu.lines if line.name.startswith("Stream") for event in line.events
        ]  # fmt: skip
    of_nccl = [k for k in kernels if k[2].startswith("nccl")]
    rest = covered([k[:2] for k in kernels if not k[2].startswith("nccl")])
    span = max(k[1] for k in kernels) - min(k[0] for k in kernels)
    by_kernel: dict[str, list[float]] = {}
    for start, end, name in of_nccl:
        count, spent = by_kernel.get(name, (0, 0.0))
        by_kernel[name] = [count + 1, round(spent + (end - start) / 1e6, 2)]
    shares = covered([k[:2] for k in of_nccl]) / span, (covered([k[:2] for k in kernels]) - rest) / span
    found = {"communication": shares[0], "exposed": shares[1], "collectives": by_kernel}
    return found | {"computes_ms": rest / 1e6, "spans_ms": span / 1e6}


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def on_mesh(config: Config, key: Key, rows: int, steps: int, ready: Callable[[], Any]) -> Row:
    """``measure`` with ``rows`` rows a device, and the communication's shares."""
    mesh, devices = key
    axes = sizes(mesh, devices) or {}
    rows, longer = (rows, devices) if mesh == "context" else (rows * devices, 1)
    config = config.replace(
        train__batch_size=rows,
        train__seq_len=longer * config.train.seq_len,
        **{f"mesh__{axis}": size for axis, size in axes.items()},
    )
    configs.check_batch(config.train, axes)
    looked: list[Row] = []
    batch = random_batch(rows, config.train.seq_len, config.model.vocab_size)
    found = measure(config, batch, steps, lambda run: looked.append(communication(run)), ready)
    return found | looked[0]


def alone(config: Config, devices: int, rows: int, steps: int, ready: Callable[[], Any]) -> Row:
    """Losses of one device that accumulates what ``devices`` devices train on."""
    config = config.replace(
        train__batch_size=rows * devices, train__microbatches=devices * config.train.parts,
        mesh__data=1, mesh__fsdp=1, mesh__tensor=1, mesh__context=1,
    )  # fmt: skip
    batch = random_batch(rows * devices, config.train.seq_len, config.model.vocab_size)
    return {"losses": measure(config, batch, max(1, steps - 2), ready=ready)["losses"]}


def attempt(what: Callable[[], Row]) -> Row:
    """What it returns, or {"error": the first line of what XLA said}; memory is free again after it."""
    try:
        return what()
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).splitlines()[0][:120]}
    finally:
        gc.collect()


def run(
    config: Config, key: Key, rows: int, steps: int, check: int, ready: Callable[[], Any] = lambda: None
) -> Row:
    """What one key comes to, in this process."""
    if key[0] == ALONE:
        return attempt(lambda: alone(config, key[1], rows, check, ready))
    return attempt(lambda: on_mesh(config, key, rows, max(steps, check), ready))


def compare(found: Mapping[Key, Row]) -> list[Row]:
    """A row for each mesh: what was measured beside one device's."""
    speed = found["data", 1].get("tokens_per_second", float("nan"))
    rows = []
    for (mesh, count), measured in found.items():
        if mesh == ALONE:
            continue
        row = {**measured, "mesh": mesh if count > 1 else "one", "devices": count}
        if "error" not in row:
            row["of_linear"] = row["tokens_per_second"] / (speed * count)
        expected = found.get((ALONE, count), {}).get("losses", ())
        if expected and mesh != "context" and "error" not in row:
            pairs = list(zip(row["losses"], expected, strict=False))
            row["loss_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
        rows.append(row)
    return rows


def in_jobs(wanted: Sequence[Key], arguments: Sequence[str], count: int, stages: Sequence[bool]) -> list[Row]:
    """`run` for each key in a process of its own, ``count`` at a time that compile (`jobs.run`)."""
    command = lambda mesh, devices: ["-m", "benchmarks.scaling", *arguments, f"--job={mesh},{devices}"]
    found = jobs.run({f"{mesh} {devices}": command(mesh, devices) for mesh, devices in wanted}, count, stages)
    return list(found.values())


def table(rows: Sequence[Row]) -> str:
    heads = "mesh", "devices", "tokens/s", "of linear", "MFU, HFU", "planned", "peak", "communication", "loss"
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["mesh"], str(row["devices"])]
        if "error" in row:
            cells += [row["error"], *[""] * (len(heads) - 3)]
        else:
            cells += [f"{row['tokens_per_second']:,.0f}", f"{row['of_linear']:.1%}"]
            cells += [f"{row['mfu']:.1%}, {row['hfu']:.1%}"]
            cells += [f"{row['planned_gib']:.2f} GiB", f"{row['peak_gib']:.2f} GiB"]
            cells += [f"{row['communication']:.1%}, {row['exposed']:.1%}"]
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
    parser.add_argument("--jobs", type=int, default=0, help="that compile side by side; 0: one process")
    parser.add_argument("--stages", default="compile,time", help="of --jobs")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # "mesh,devices": be one of them
    args, rest = parser.parse_known_args()
    overrides = dict(field.removeprefix("--config.").split("=", 1) for field in rest)
    overrides |= {"train.seq_len": str(args.seq_len), "train.batch_size": str(args.batch_size)}
    config = configs.resolve(configs.load(args.config, {"mesh.data": "1", "mesh.fsdp": "1"} | overrides))
    given = args.batch_size, args.steps, args.check
    if args.job:
        mesh, _, count = args.job.rpartition(",")
        found = {"mesh": mesh, "devices": int(count)} | run(config, (mesh, int(count)), *given, jobs.wait)
        print(json.dumps(found), flush=True)
        return
    devices = [int(count) for count in args.devices.split(",")]
    wanted = keys(devices, args.meshes.split(","), args.check)
    if args.jobs:
        stages = [stage == "time" for stage in args.stages.split(",")]
        found = dict(zip(wanted, in_jobs(wanted, sys.argv[1:], args.jobs, stages), strict=True))
        if not stages[-1]:
            return
    else:
        if max(devices) > jax.device_count():
            parser.error(f"--devices={args.devices}: there are {jax.device_count()}")
        found = {}
        for key in wanted:
            found[key] = run(config, key, *given)
            print(json.dumps({"mesh": key[0], "devices": key[1]} | found[key]), flush=True)
    print(f"\n{args.config}, {args.batch_size} x {args.seq_len} tokens a device, jax {jax.__version__}\n")
    print(table(compare(found)))


if __name__ == "__main__":
    main()
