"""A training step compiled for a mesh of GPUs that is not there: memory a device, and what travels in a step.

    JAX_PLATFORMS=cpu python train.py --config=... --dry_run --devices=h100:64

needs jax's CUDA plugin (jax-cuda12-plugin, jax-cuda12-pjrt) and ptxas, no GPU and no driver. Without a GPU
nothing is tuned, so the program says what it needs and not how long it takes; cuDNN's attention, which asks
live devices, is replaced by the blockwise one.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hybridlm import config as configs
from hybridlm import fit, model, program, sharding
from hybridlm.config import Config
from hybridlm.errors import ConfigError
from pallas_kernels import H100, auto_means, compiled_for

CARD_BYTES = 84978434048  # an H100's, as the driver says in h100.txtpb
NODE = 8  # GPUs of a host
# Bytes a second that a GPU sends: NVLink 4, one direction, and a network card of 400 Gb/s.
LINKS = {"NVLink at 450 GB/s": 450e9, "network at 50 GB/s": 50e9}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
CALLED = r"\b(calls|body|branch_computations)=(\{[^}]*\}|[%\w.\-]+)"


class Needs(NamedTuple):
    """Of one device. arguments: parameters, optimiser state and batch, which the step's results replace.

    remat: the policy, for `auto` what it chooses there.  temporaries: everything else that is alive at once.
    sent: bytes by kind of collective in one step.
    """

    remat: str
    arguments: int
    temporaries: int
    sent: dict[str, float]

    @property
    def memory(self) -> int:
        return self.arguments + self.temporaries


def parse(devices: str) -> int:
    """The number of GPUs in "h100:64"; ConfigError for anything else."""
    found = re.fullmatch(r"h100:(\d{1,6})", devices)
    count = int(found[1]) if found else 0
    if not count or (count > NODE and count % NODE):
        fix = f"Say h100:N with N up to {NODE}, or a multiple of {NODE}: hosts of {NODE}."
        raise ConfigError("--devices", devices, "names no GPUs that can be compiled for", fix)
    return count


def absent(devices: str) -> list[Any]:
    """Devices of that many GPUs, which programs can be compiled for; ConfigError without the CUDA plugin."""
    from jax.experimental import topologies

    count = parse(devices)
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    topology = f"1x1x{count}" if count <= NODE else f"1x{count // NODE}x{NODE}"
    target = (Path(__file__).parent / "h100.txtpb").read_text()
    try:
        made = topologies.get_topology_desc("H100", platform="cuda", topology=topology, target_config=target)
    except Exception as error:  # whatever the plugin's absence or version does
        fix = "It takes jax-cuda12-plugin and jax-cuda12-pjrt of jax's version, and ptxas on the path."
        problem = f"cannot be compiled for here ({str(error)[:80]})"
        raise ConfigError("--devices", devices, problem, fix) from error
    return list(made.devices)


def needs(config: Config, devices: str) -> Needs:
    """Compiles the step of a resolved config for ``devices``; minutes for large models."""
    mesh = sharding.make_mesh(config.mesh, absent(devices))
    configs.check_batch(config.train, mesh.shape)
    where, shape = sharding.batch_sharding(mesh), (config.train.batch_size, config.train.seq_len)
    row = jax.ShapeDtypeStruct(shape, np.int32, sharding=where)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), row)
    definition = model.build(config)
    automatic = definition.model.remat == "auto"
    available = CARD_BYTES * 9 // 10  # as much as train.py lets XLA have

    def step(policy: str) -> fit.Step:
        # Built outside the mesh, where it would compute on devices that are not there.
        one = fit.settled(definition, policy) if automatic else definition
        built: Any = program.build(config, one, mesh, None)
        with jax.set_mesh(mesh), compiled_for(H100), auto_means("hopper", "xla"):
            traced = built.step.trace(built.shapes, batch)
            most = available * mesh.size if automatic and policy != fit.FASTEST_FIRST[-1] else None
            return fit.compiled(traced, most, lowering_platforms=("cuda",))

    given = definition.model.remat
    policy, done, _ = fit.choose(step, available) if automatic else (given, step(given), "")
    found = done.run.memory_analysis()
    return Needs(policy, found.argument_size_in_bytes, found.temp_size_in_bytes, sent(done.run.as_text()))


def sent(hlo: str) -> dict[str, float]:
    """Bytes that one device sends in a run of a compiled module, by kind of collective.

    Rings: of a result of S bytes over n devices an all-gather sends S (n-1)/n, an all-reduce twice that; of
    an argument of S bytes so does a reduce-scatter; a permutation sends S. Bodies of loops count as often as
    XLA knows that they run; those of unknown length once.
    """
    computations, entry = _computations(hlo)
    memo: dict[str, dict[str, float]] = {}

    def total(name: str) -> dict[str, float]:
        if name not in memo:
            memo[name] = {}
            for line in computations.get(name, ()):
                for kind, size in _of_line(line):
                    memo[name][kind] = memo[name].get(kind, 0) + size
                times = re.search(r"known_trip_count\D*(\d+)", line)
                for how, called in re.findall(CALLED, line):
                    scale = int(times[1]) if times and how == "body" else 1
                    for one in re.findall(r"[\w.\-]+", called):
                        for kind, size in total(one).items():
                            memo[name][kind] = memo[name].get(kind, 0) + scale * size
        return memo[name]

    return total(entry)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if begins := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = begins[2]
            found[name] = []
            entry = name if begins[1] else entry
        elif name and line.startswith("  "):
            found[name].append(line)
    return found, entry


def _of_line(line: str) -> Iterator[tuple[str, float]]:
    """(kind, bytes sent) of an instruction that starts a collective."""
    called = re.search(r"= (.*?) (" + "|".join(COLLECTIVES) + r")(-start)?\((.*)", line)
    if not called:
        return
    kind = called[2]
    paired = re.match(r"\(\([^()]*\), (.*)", called[1])  # ((arguments), results), of newer starts
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", paired[1] if paired else called[1])
    result: float = sum(_bytes(*shape) for shape in shapes)
    group = _group(line)
    if called[3] and not paired:  # an older start's results have its arguments beside them
        beside = {"all-gather": group, "reduce-scatter": 1 / group, "collective-permute": 1}
        result *= beside[kind] / (beside[kind] + 1) if kind in beside else 1
    share = (group - 1) / group
    factors = {"all-reduce": 2 * share, "reduce-scatter": group * share, "collective-permute": 1.0}
    yield kind, result * factors.get(kind, share)


def _bytes(dtype: str, dims: str) -> int:
    """Of an array such as bf16[2,3]; of a pred, a byte each."""
    bits = re.search(r"\d+", dtype)
    return (int(bits[0]) // 8 if bits else 1) * math.prod(int(d) for d in dims.split(",") if d)


def _group(line: str) -> int:
    """Devices of one group of a collective."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return max(1, len(listed[1].split(",")))
    if named := re.search(r"replica_groups=\w*\[([^\]]*)\] \{([^}]*)\}", line):  # mesh['a'=4,'b'=2] {'b'}
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    return 2


def lines(found: Needs, devices: str) -> dict[str, str]:
    """What `needs` came to, as name -> text."""
    gib = lambda size: f"{size / 2**30:.2f} GiB"
    fits = "fits" if found.memory < CARD_BYTES else "does NOT fit"
    kinds = ", ".join(f"{kind} {gib(size)}" for kind, size in found.sent.items() if size) or "nothing"
    whole = sum(found.sent.values())
    times = ", ".join(f"{whole / speed:.3g} s over {link}" for link, speed in LINKS.items())
    parts = f"state and batch {gib(found.arguments)}, temporaries {gib(found.temporaries)}"
    parts += f", with model.remat={found.remat}"
    return {
        f"compiled for {devices}": f"{gib(found.memory)} a device, {fits} in {gib(CARD_BYTES)}: {parts}",
        "sent by a device in a step": f"{kinds}; {times} if nothing hides it",
    }
