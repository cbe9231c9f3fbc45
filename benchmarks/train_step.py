"""Seconds of one train step, tokens/s, MFU and HFU of a config on this device, per backend of the recurrence.

    python -m benchmarks.train_step --config=configs/hybrid.py:340m,gdn,3:1 --batch_size=8 --seq_len=4096 \
        [--microbatches=1] [--backends=auto,xla] [--steps=8] [--profile] [--config.section.field=value ...]
    python benchmarks/train_step.py --old .old --configs 340m,kda,3:1 1.3b,kda,3:1 340m,full [--rounds=2] ...

Of a config with stages it is a step of the first of `stages.order`, with its teacher where it has one:
--config=configs/linearise.py:teacher=runs/x,gdn,3:1 --config.stages.order=distil beside
--config.stages.order=tune is what the teacher costs. The student lends it what it may, as in a run
(docs/linearise.md), and with --apart nothing.

Tokens are random and lie in memory, so that data costs nothing. first_step_s is the time from nothing to the
end of the first step: tracing, and initialisation beside it, compilation, one step. peak_gib is what the
device's allocator held at most. Prints one JSON line a backend, and with --profile the GPU time of one step
by kernel. --steps=0 compiles and runs nothing, so that with JAX_COMPILATION_CACHE_DIR a later call finds
the program.

--old: this same script with the code of another checkout of the project, unpacked in that folder, and with
the code here, in turns, each time in a process of its own; a table at the end. A round after the first finds
its programs in a compilation cache, so first_step_s is the first round's. A config that names no file is an
argument of configs/hybrid.py.

A backend may be several, of which an op takes the first that can: --backends=triton+cudnn+xla,cudnn+xla is
Hopper's kernels off, and then all but attention's.
"""

import argparse
import gc
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # --old runs this file with the code of another checkout
    from hybridlm.config import Config

HERE = Path(__file__).resolve()


def measure(
    config: "Config",
    batch: dict[str, Any],
    steps: int,
    look: Callable[[Callable], Any] | None = None,
    ready: Callable[[], Any] | None = None,
    **lends: Any,
) -> dict[str, Any]:
    """Median seconds of ``steps`` steps of ``config`` on ``batch``, and what the first one took.

    As in training, a step is read when the next one is queued, so that the device never waits for the host.

    steps: 0 returns the seconds of compilation alone.
    look: given a function that runs one more step.
    ready: called when the step is compiled, and before anything lies on the devices. Without it the first
        parameters are drawn while the step is traced, as in training.
    lends: ``lent`` of `program.build`, which an older checkout has not.
    """
    import jax

    from hybridlm import cost, model, program, sharding

    definition = model.build(config)
    mesh = sharding.make_mesh(config.mesh)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        where, built = sharding.batch_sharding(mesh), program.build(config, definition, mesh, None, **lends)
        teacher = _teacher(config, built)
        beside = steps > 0 and ready is None
        drawn = _drawn(built, mesh, beside)
        rows = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for n, x in batch.items()}
        traced: list[Any] = []  # the last is the one that runs

        def of(config: "Config", definition: Any) -> Any:
            step: Any = program.build(config, definition, mesh, None, **lends).step
            traced.append(step.trace(built.shapes, rows, *teacher))
            return traced[-1]

        trace = lambda definition: of(config, definition)
        lower = lambda definition: trace(definition).lower()
        if config.model.remat == "auto":
            from hybridlm import fit  # which an older checkout has not, or has with lowered steps

            if not config.train.microbatches:
                config = fit.parted(config, definition, mesh, of, fit.limit())
            takes = "ready" in inspect.signature(fit.step).parameters
            before = (drawn,) if beside and takes else ()
            run = fit.step(config, definition, mesh, trace if hasattr(fit, "held") else lower, *before)
        else:
            lowered = lower(definition)
            if beside:
                drawn()
            run = lowered.compile()
        compiled = time.perf_counter() - began
        if not steps:
            return {"compiled_s": compiled}
        if ready:
            ready()
        began = time.perf_counter()
        state, on_device = drawn(), sharding.put_batch(batch, mesh)
        initialised = time.perf_counter() - began
        start = time.perf_counter()
        state, metrics = run(state, on_device, *teacher)
        losses, seconds = [float(metrics["loss"])], []
        first = time.perf_counter() - start
        state, behind = run(state, on_device, *teacher)
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = run(state, on_device, *teacher)
            losses.append(float(behind["loss"]))
            behind, now = metrics, time.perf_counter()
            seconds.append(now - start)
            start = now
        losses.append(float(behind["loss"]))
        if look:
            look(lambda: run(state, on_device, *teacher))
    tokens, step, device = batch["tokens"].size, median(seconds), jax.devices()[0]
    peak = (cost.peak_flops(device.device_kind) or float("nan")) * mesh.size
    flops = cost.train_flops_per_token(config) * tokens
    stats, memory = device.memory_stats() or {}, run.memory_analysis()
    return {
        "step_s": step,
        "spread_s": max(seconds) - min(seconds),
        "tokens_per_second": tokens / step,
        "mfu": flops / step / peak,
        "hfu": (flops + _again(traced[-1], config)) / step / peak,
        "first_step_s": compiled + initialised + first,
        "temp_gib": memory.temp_size_in_bytes / 2**30,
        "planned_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
        "peak_gib": stats.get("peak_bytes_in_use", float("nan")) / 2**30,
        "loss": losses[-1],
        "losses": losses,
    }


def _drawn(built: Any, mesh: Any, beside: bool) -> Callable[[], Any]:
    """What makes the first state, or waits for it where it is made beside what follows."""
    import jax

    def draw() -> Any:
        with jax.set_mesh(mesh):  # which is a thread's own
            return built.init(jax.random.key(0))

    if not beside:
        return draw
    pool = ThreadPoolExecutor(1)
    made = pool.submit(draw)
    pool.shutdown(wait=False)
    return made.result


def _teacher(config: "Config", built: Any) -> tuple[Any, ...]:
    if not getattr(built, "teacher", ()):
        return ()
    from hybridlm import init_from

    return init_from.teacher(config, built)


def _lent(config: "Config") -> dict[str, frozenset[str]]:
    try:
        from hybridlm import lent
    except ImportError:  # an older checkout
        return {}
    return {"lent": lent.names([config])}


def _again(traced: Any, config: "Config") -> float:
    try:
        from hybridlm import recomputation
    except ImportError:  # an older checkout
        return float("nan")
    return recomputation.flops(traced.jaxpr.jaxpr, config)


def random_batch(rows: int, seq_len: int, vocab_size: int) -> dict[str, Any]:
    """Rows of one document each."""
    import numpy as np

    shape = (rows, seq_len)
    tokens = np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(seq_len, dtype=np.int32), shape)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.ascontiguousarray(positions),
    }


def one(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Measures --config with the code that this process imports."""
    import pallas_kernels
    from benchmarks import gpu_profile
    from hybridlm import config as configs

    config = configs.resolve(configs.load(args.config, overrides))
    if getattr(config, "stages", None):  # an older checkout knows none
        from hybridlm import stages

        config = stages.split(config, configs.resolve)[0][1]
    batch = random_batch(args.batch_size, args.seq_len, config.model.vocab_size)
    lends = {} if args.apart else _lent(config)
    look = lambda run: print(gpu_profile.table(gpu_profile.kernels(run)))
    rows = {}
    for backend in args.backends.split(","):
        with pallas_kernels.auto_means(*backend.split("+")):
            rows[backend] = measure(config, batch, args.steps, look if args.profile else None, **lends)
        print(json.dumps({"config": args.config, "backend": backend} | rows[backend]), flush=True)
        gc.collect()
    if len(rows) == 2 and args.steps:
        (first, a), (second, b) = rows.items()
        print(f"{first} takes {a['step_s'] / b['step_s']:.2f} of {second}'s time")


def compare(args: argparse.Namespace, rest: list[str]) -> None:
    """Both trees, in turns."""
    trees = {"old": Path(args.old).resolve(), "new": HERE.parents[1]}
    given = [f"--{name}={getattr(args, name)}" for name in ("batch_size", "seq_len", "microbatches", "steps")]
    lines = [
        "| config | code | tokens/s, median (least to most) | MFU, HFU | first step | peak | loss | of old |"
    ]
    lines.append("|" + "---|" * 8)
    for config in args.configs:
        spec = config if ".py" in config else f"configs/hybrid.py:{config}"
        found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
        with tempfile.TemporaryDirectory() as cache:
            for turn in range(args.rounds):
                for name in list(trees)[:: 1 if turn % 2 == 0 else -1]:
                    options = [f"--config={spec}", "--backends=auto", *given, *rest]
                    row = in_tree(trees[name], options, f"{cache}/{name}")
                    print(json.dumps({"code": name, "round": turn} | row), flush=True)
                    found[name].append(row)
        speeds = {name: [row["tokens_per_second"] for row in rows] for name, rows in found.items()}
        for name, rows in found.items():
            speed, first = speeds[name], rows[0]
            cells = [config, name, f"{median(speed):,.0f} ({min(speed):,.0f} to {max(speed):,.0f})"]
            shares = [median(row[kind] for row in rows) for kind in ("mfu", "hfu")]
            cells += [", ".join(f"{share:.1%}" for share in shares), f"{first['first_step_s']:.1f} s"]
            cells += [f"{first['peak_gib']:.1f} GiB", f"{first['loss']:.5f}"]
            cells += [f"{median(speed) / median(speeds['old']):.4f}"]
            lines.append("| " + " | ".join(cells) + " |")
    print("\n".join(lines))


def in_tree(tree: Path, options: list[str], cache: str) -> dict[str, Any]:
    """What this script prints last with the code in ``tree``."""
    path = os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": cache}
    command = [sys.executable, str(HERE), *options]
    done = subprocess.run(command, cwd=tree, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config")
    what.add_argument("--configs", nargs="+", help="with --old")
    parser.add_argument("--old", help="a folder with another checkout")
    parser.add_argument("--rounds", type=int, default=2, help="of old and new; balanced where even")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--backends", default="auto,xla")
    parser.add_argument("--steps", type=int, default=8, help="0 only compiles")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--apart", action="store_true", help="a teacher shares no memory with the student")
    args, rest = parser.parse_known_args()
    if bool(args.old) != bool(args.configs):
        parser.error("--old and --configs go together")
    if args.old:
        compare(args, rest)
        return
    overrides = dict(field.removeprefix("--config.").split("=", 1) for field in rest)
    for name in ("batch_size", "seq_len", "microbatches"):
        overrides[f"train.{name}"] = str(getattr(args, name))
    one(args, overrides | {"mesh.data": "1", "mesh.fsdp": "1"})


if __name__ == "__main__":
    main()
