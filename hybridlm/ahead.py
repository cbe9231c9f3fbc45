"""A training step compiled for a mesh of GPUs that is not there: memory a device, and what travels in a step.

    JAX_PLATFORMS=cpu python train.py --config=... --dry_run --devices=h100:64

needs jax's CUDA plugin (jax-cuda12-plugin, jax-cuda12-pjrt) and ptxas, no GPU and no driver. Without a GPU
nothing is tuned, so the program says what it needs and not how long it takes; cuDNN's attention, which asks
live devices, is replaced by the blockwise one.
"""

import itertools
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hybridlm import config as configs
from hybridlm import fit, model, program, sharding
from hybridlm.config import Config
from hybridlm.errors import ConfigError
from pallas_kernels import H100, auto_means, compiled_for

log = logging.getLogger("hybridlm")

CARD_BYTES = 84978434048  # an H100's, as the driver says in h100.txtpb
NODE = 8  # GPUs of a host
# Bytes a second that a GPU sends: NVLink 4, one direction, and its network card of 400 Gb/s.
NVLINK, NETWORK = 450e9, 50e9
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Of no effect on the bytes: what XLA and ptxas do for a program's speed after its memory is assigned, and
# kernels that are compiled to be tried, of which none can be timed.
QUICK = {"xla_backend_optimization_level": 0, "xla_gpu_disable_gpuasm_optimizations": True}
UNTRIED = {"xla_gpu_autotune_level": 0}
CALLS = "calls=", "body=", "branch_computations="
CALLED = r"\b(calls|body|branch_computations)=(\{[^}]*\}|[%\w.\-]+)"


class Needs(NamedTuple):
    """Of one device. arguments: parameters, optimiser state and batch, which the step's results replace.

    remat: the policy, for `auto` what it chooses there.  temporaries: everything else that is alive at once.
    sent: bytes by kind of collective in one step.  seconds: that they take, one after the other.
    """

    remat: str
    arguments: int
    temporaries: int
    sent: dict[str, float]
    seconds: float

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


def needs(config: Config, devices: str, borrowed: frozenset[str] = frozenset()) -> Needs:
    """Compiles the step of a resolved config for ``devices``; minutes for large models.

    borrowed: what a teacher has of the student (`hybridlm.lent`).
    """
    policy, done = compiled_step(config, devices, borrowed)
    found = done.run.memory_analysis()
    hlo = done.run.as_text()
    seconds = sum(sent(hlo, _seconds).values())
    return Needs(policy, found.argument_size_in_bytes, found.temp_size_in_bytes, sent(hlo), seconds)


def compiled_step(
    config: Config, devices: str, borrowed: frozenset[str] = frozenset()
) -> tuple[str, fit.Step]:
    """(the policy of `model.remat`, the step of a resolved config compiled for ``devices``)."""
    mesh = sharding.make_mesh(config.mesh, absent(devices))
    configs.check_batch(config.train, mesh.shape)
    where, shape = sharding.batch_sharding(mesh), (config.train.batch_size, config.train.seq_len)
    row = jax.ShapeDtypeStruct(shape, np.int32, sharding=where)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), row)
    definition = model.build(config)
    automatic = definition.model.remat == "auto"
    available = CARD_BYTES * 9 // 10  # as much as train.py lets XLA have

    def trace(config: Config, one: model.Definition) -> Any:
        # Built outside the mesh, where it would compute on devices that are not there.
        built: Any = program.build(config, one, mesh, None, lent=borrowed)
        with jax.set_mesh(mesh), compiled_for(H100), auto_means("hopper", "xla"):
            return built.step.trace(built.shapes, batch, *built.teacher)

    config = fit.parted(config, definition, mesh, trace, available)

    def step(policy: str) -> fit.Step:
        traced = trace(config, fit.settled(definition, policy) if automatic else definition)
        most = available * mesh.size if automatic and policy != fit.FASTEST_FIRST[-1] else None
        with jax.set_mesh(mesh), compiled_for(H100), auto_means("hopper", "xla"):
            return _compiled(traced, most)

    given = definition.model.remat
    policy, done, _ = fit.choose(step, available) if automatic else (given, step(given), "")
    return policy, done


def _compiled(traced: Any, most: int | None) -> fit.Step:
    try:
        return fit.compiled(traced, most, options=QUICK | UNTRIED, lowering_platforms=("cuda",))
    except jax.errors.JaxRuntimeError as error:
        if "No supported config" not in str(error):
            raise
        log.info("compiled once more: for some products XLA has only kernels that it tries")
        return fit.compiled(traced, most, options=QUICK, lowering_platforms=("cuda",))


def sent(
    hlo: str, cost: Callable[[float, np.ndarray], float] = lambda size, groups: size
) -> dict[str, float]:
    """Bytes that one device sends in a run of a compiled module, by kind of collective; or another cost of
    so many bytes among the devices of ``groups`` [groups, members].

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
                for kind, size, groups in _of_line(line):
                    memo[name][kind] = memo[name].get(kind, 0) + cost(size, groups)
                if not any(how in line for how in CALLS):
                    continue
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
        if line.endswith("{") and (begins := re.match(r"(ENTRY )?%?([\w.\-]+) ", line)):
            name = begins[2]
            found[name] = []
            entry = name if begins[1] else entry
        elif name and line.startswith("  "):
            found[name].append(line)
    return found, entry


def _seconds(size: float, groups: np.ndarray) -> float:
    """Of bytes that each member sends: between hosts the members in one share what their cards carry."""
    hosts = max(len(set(group)) for group in (groups // NODE).tolist())
    within = size / NVLINK
    return within if hosts == 1 else max(within, size * hosts / groups.shape[1] / NETWORK)


def _of_line(line: str) -> Iterator[tuple[str, float, np.ndarray]]:
    """(kind, bytes sent, the groups that they are sent in) of an instruction that starts a collective."""
    if not any(kind in line for kind in COLLECTIVES):
        return
    called = re.search(r"= (.*?) (" + "|".join(COLLECTIVES) + r")(-start)?\((.*)", line)
    if not called:
        return
    kind = called[2]
    paired = re.match(r"\(\([^()]*\), (.*)", called[1])  # ((arguments), results), of newer starts
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", paired[1] if paired else called[1])
    result: float = sum(_bytes(*shape) for shape in shapes)
    groups = _groups(line)
    group = groups.shape[1]
    if called[3] and not paired:  # an older start's results have its arguments beside them
        beside = {"all-gather": group, "reduce-scatter": 1 / group, "collective-permute": 1}
        result *= beside[kind] / (beside[kind] + 1) if kind in beside else 1
    share = (group - 1) / group
    factors = {"all-reduce": 2 * share, "reduce-scatter": group * share, "collective-permute": 1.0}
    yield kind, result * factors.get(kind, share), groups


def _bytes(dtype: str, dims: str) -> int:
    """Of an array such as bf16[2,3]; of a pred, a byte each."""
    bits = re.search(r"\d+", dtype)
    return (int(bits[0]) // 8 if bits else 1) * math.prod(int(d) for d in dims.split(",") if d)


def _groups(line: str) -> np.ndarray:
    """Devices that exchange, by number: [groups, members]; of a permutation its pairs."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line):
        return np.array(
            [one.split(",") for one in re.findall(r"\d[\d,]*", listed[1].replace("},{", ";"))], int
        )
    if named := re.search(r"replica_groups=\w*\[([^\]]*)\] \{([^}]*)\}", line):  # mesh['a'=4,'b'=2] {'b'}
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        return _along([(name, int(size)) for name, size in axes], named[2])
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = np.arange(math.prod(_whole(iota[2]))).reshape(_whole(iota[2]))
        return ids.transpose(_whole(iota[3]) if iota[3] else None).reshape(-1, int(iota[1]))
    return np.arange(2)[None]


def _along(axes: list[tuple[str, int]], chosen: str) -> np.ndarray:
    """Groups along the ``chosen`` axes of a mesh: 'a','b':(2)4, the latter in part, 4 after the first 2."""
    parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", chosen)
    sizes: list[int] = []
    taken = []
    for name, size in axes:
        ranges = [
            (int(pre or 1), int(pre or 1) * int(own or size)) for axis, pre, own in parts if axis == name
        ]
        edges = sorted({1, size}.union(*ranges))
        for low, high in itertools.pairwise(edges):
            taken += [len(sizes)] * any(a <= low and high <= b for a, b in ranges)
            sizes.append(high // low)
    ids = np.moveaxis(np.arange(math.prod(sizes)).reshape(sizes), taken, range(-len(taken), 0))
    return ids.reshape(-1, math.prod(sizes[i] for i in taken))


def _whole(listed: str) -> list[int]:
    return [int(one) for one in listed.split(",")]


def lines(found: Needs, devices: str) -> dict[str, str]:
    """What `needs` came to, as name -> text."""
    gib = lambda size: f"{size / 2**30:.2f} GiB"
    fits = "fits" if found.memory < CARD_BYTES else "does NOT fit"
    kinds = ", ".join(f"{kind} {gib(size)}" for kind, size in found.sent.items() if size) or "nothing"
    links = (
        f"NVLink at {NVLINK / 1e9:.0f} GB/s in a host, a card of {NETWORK / 1e9:.0f} GB/s a GPU between hosts"
    )
    parts = f"state and batch {gib(found.arguments)}, temporaries {gib(found.temporaries)}"
    parts += f", with model.remat={found.remat}"
    return {
        f"compiled for {devices}": f"{gib(found.memory)} a device, {fits} in {gib(CARD_BYTES)}: {parts}",
        "sent by a device in a step": f"{kinds}; {found.seconds:.3g} s if nothing hides it ({links})",
    }
