"""Seconds of one train step, tokens/s and MFU of a config on this device, per backend of the recurrence.

    python -m benchmarks.train_step --config=configs/hybrid.py:340m,gdn,3:1 --batch_size=8 --seq_len=4096 \
        [--microbatches=1] [--backends=auto,xla] [--steps=8] [--profile] [--config.section.field=value ...]

Tokens are random and lie in memory, so that data costs nothing. first_step_s is the time from nothing to the
end of the first step: initialisation, tracing, compilation, one step. Prints one JSON line a backend, and
with --profile the GPU time of one step by kernel.
"""

import argparse
import gc
import json
import time
from typing import Any

import jax
import numpy as np

import pallas_kernels
from benchmarks import gpu_profile
from hybridlm import config as configs
from hybridlm import cost, model, sharding, trainer


def measure(
    config: Any, batch: dict[str, np.ndarray], steps: int, profiled: bool = False
) -> dict[str, float]:
    """Median seconds of ``steps`` steps of ``config`` on ``batch``, and what the first one took.

    ``profiled``: one more step, whose kernels are printed.
    """
    definition = model.build(config)
    mesh = sharding.make_mesh(config.mesh)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        program = trainer.build(config, definition, mesh, None)
        state = program.init(jax.random.key(0))
        run = trainer.compiled(program, mesh, batch)
        compiled = time.perf_counter()
        on_device = sharding.put_batch(batch, mesh)
        seconds = []
        for _ in range(steps + 1):
            start = time.perf_counter()
            state, metrics = run(state, on_device)
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - start)
        if profiled:
            print(gpu_profile.table(gpu_profile.kernels(lambda: run(state, on_device))))
    memory = run.memory_analysis()  # type: ignore[attr-defined]
    tokens = batch["tokens"].size
    median = float(np.median(seconds[1:]))
    peak = cost.peak_flops(jax.devices()[0].device_kind)
    mfu = cost.train_flops_per_token(config) * tokens / median / peak if peak else float("nan")
    return {
        "step_s": median,
        "spread_s": max(seconds[1:]) - min(seconds[1:]),
        "tokens_per_second": tokens / median,
        "mfu": mfu,
        "first_step_s": compiled - began + seconds[0],
        "temp_gib": memory.temp_size_in_bytes / 2**30,
        "loss": loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--backends", default="auto,xla")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    args, rest = parser.parse_known_args()
    overrides = dict(field.removeprefix("--config.").split("=", 1) for field in rest)
    for name in ("batch_size", "seq_len", "microbatches"):
        overrides[f"train.{name}"] = str(getattr(args, name))
    overrides |= {"mesh.data": "1", "mesh.fsdp": "1"}
    config = configs.resolve(configs.load(args.config, overrides))
    shape = (args.batch_size, args.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(args.seq_len, dtype=np.int32), shape)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.ascontiguousarray(positions),
    }
    rows = {}
    for backend in args.backends.split(","):
        with pallas_kernels.auto_means(backend):
            rows[backend] = measure(config, batch, args.steps, args.profile)
        print(json.dumps({"config": args.config, "backend": backend} | rows[backend]), flush=True)
        gc.collect()
    if len(rows) == 2:
        (first, a), (second, b) = rows.items()
        print(f"{first} takes {a['step_s'] / b['step_s']:.2f} of {second}'s time")


if __name__ == "__main__":
    main()
