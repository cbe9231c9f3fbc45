"""What a run says before its first step: six lines, and one each for fp8, for updates that are looked at, and
for a model that no public format has."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hybridlm import cost, fp8, report
from hybridlm.config import Config
from hybridlm.member import Member
from hybridlm.model import build
from hybridlm.run import private
from pallas_kernels import Choice, explain
from pallas_kernels.dispatch import KERNELS

CUDA = "Python >= 3.12 and `pip install 'hybridlm[cuda]'` (jax >= 0.11.2 with CUDA 12)"

UNTAMED = "with this learning rate, decay, b1, b2 and eps they may not be finite where gradients are"


def lines(
    run: Member, start: int, mesh: Mapping[str, int], program: Any, parts: int, runs: int = 1
) -> list[str]:
    """What a user wants to know at once, a line each.

    start: the step resumed from.  parts: of a batch, as found for train.microbatches = 0.
    runs: that share ``program``.
    """
    config = run.config
    summary, steps = cost.summary(config), config.train.steps
    held = {"held out": run.val_data, **{f"val.{name}": one for name, one in run.val_sets.items()}}
    held_out = "; ".join(f"{name}: {one.source.describe()}" for name, one in held.items())
    begins = f"resumed at step {start:,}" if start else "a new run"
    said = {
        "devices": _devices(mesh),
        "kernels": kernels(choices(config, program, parts, runs)),
        "model": f"{summary['parameters']:,} parameters, {summary['plan']}; {report.full_layers(config)}",
        "data": f"{report.amount(run.whole, run.train_data)}; {held_out}",
        "workdir": private.hide(str(run.workdir)),
        "steps": f"all {steps:,} are done" if start == steps else f"{start + 1:,} to {steps:,}, {begins}",
    }
    if config.model.matmul == "fp8":
        said["matmul"] = fp8.said(config.model, build(config).layers)
    if not cost.tame(config):
        said["updates"] = "are looked at, with the weights twice in memory: " + UNTAMED
    try:
        from hybridlm.convert import families  # training knows no converter: it asks them, here alone

        model_type, reason = families.public_format(config)
    except Exception as error:  # a converter's mistake costs this line, not the run
        model_type, reason = "", f"was not compared with public formats ({type(error).__name__}: {error})"
    if not model_type:
        said["export"] = f"the model {reason}"
    return [f"{name:<8} {text}" for name, text in said.items()]


def _devices(mesh: Mapping[str, int]) -> str:
    first, axes = jax.devices()[0], ", ".join(f"{name} {size}" for name, size in mesh.items())
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    devices = f"{jax.device_count()} x {first.device_kind} ({first.platform}){processes}"
    return f"{devices}, mesh {axes}, jax {jax.__version__}"


def choices(config: Config, program: Any, parts: int, runs: int = 1) -> list[Choice]:
    """The backend of every op in the forward pass of a microbatch; traces it, computes nothing."""
    rows = config.train.batch_size // parts
    row = jax.ShapeDtypeStruct((rows, config.train.seq_len), np.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), row)
    params = program.shapes["params"]
    if runs > 1:
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((runs, *leaf.shape), leaf.dtype), params)
    return explain(program.evaluate, params, batch, *program.teacher)


def kernels(found: Sequence[Choice]) -> str:
    """Which backends compute the ops, why the kernels before them do not, and what would have to be there."""
    ran: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for choice in found:
        ran.setdefault(choice.backend, []).append(choice.op)
        for name, reason in choice.refused:
            refused.setdefault(reason, []).append(name)
    unique = lambda names: ", ".join(dict.fromkeys(names))
    said = "; ".join(f"{name}: {unique(ops)}" for name, ops in ran.items()) or "none of ours in this model"
    if refused:
        said += "; not " + "; not ".join(f"{unique(names)}: {reason}" for reason, names in refused.items())
    if not set(ran) & set(KERNELS) and refused and os.path.exists("/dev/nvidiactl"):
        wanted = jax.default_backend() != "gpu" or any("cannot be imported" in reason for reason in refused)
        said += f"; for kernels on this GPU: {CUDA}" if wanted else ""
    return said
