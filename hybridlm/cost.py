"""What a config costs before anything runs: parameters, decode memory, FLOPs, device memory.

Parameters are counted exactly, from the shapes of the model itself. State and cache are those of
decoding one sequence of train.seq_len tokens. FLOPs count a multiply-add as two; a training step is three
forward passes (one forward, two backward), recomputation not counted, as usual for MFU (HFU counts it, too:
`hybridlm.recomputation`). Memory per device is an estimate, good to tens of percent: the compiler decides.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from hybridlm import groups, loss, mixers, mlps, model, optimizer
from hybridlm.block import Spec
from hybridlm.config import Config
from hybridlm.kinds import Settings

STATE_BYTES = 4  # recurrent states are float32

# Dense bf16 peak of one device, by a part of its `device_kind`, first match first (vendors' data sheets).
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


class Layer(NamedTuple):
    """One row of the layer table; bytes are those of one sequence of train.seq_len tokens.

    settings: those that differ from the kinds' defaults, of the mixer and of an MLP other than SwiGLU.
    full: attends over the whole context (`mixers.Config.full_attention`; a sliding window does not count).
    active_parameters: those that a token touches, fewer where it is routed to some of many experts, more
        where the layer goes through a module that layers share.
    """

    layer: int
    name: str
    kind: str
    settings: str
    full: bool
    parameters: int
    active_parameters: int
    state_bytes: int
    cache_bytes: int


class Memory(NamedTuple):
    """Estimated bytes per device. activations: kept between forward and backward, plus one layer at work.

    optimizer: with the average, and the updated weights beside the old where updates are looked at.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float


def peak_flops(device_kind: str) -> float | None:
    """Peak bf16 FLOP/s of a device (`jax.Device.device_kind`); None if it is not in the table."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_kind), None)


def layers(config: Config) -> list[Layer]:
    """The layer table of a resolved config."""
    definition, seq_len = model.build(config), config.train.seq_len
    rows = {}
    modules = _modules(definition)
    for spec in set(definition.layers):
        cost = spec.cost(definition.d_model, seq_len)
        parameters = _size(definition, f"layers.{definition.layers.index(spec)}.")
        idle = spec.mlp_config.idle(definition.d_model)
        rows[spec] = Layer(
            layer=-1,
            name=spec.name,
            kind=spec.kind,
            settings=_settings(spec),
            full=spec.config.full_attention,
            parameters=parameters,
            active_parameters=parameters - idle + modules.get(spec.mixer, 0),
            state_bytes=round(STATE_BYTES * cost.state),
            cache_bytes=round(definition.dtype.itemsize * cost.cache),
        )
    return [rows[spec]._replace(layer=index) for index, spec in enumerate(definition.layers)]


def full_layers(config: Config) -> list[int]:
    """Indices of the full-attention layers; see `Layer`."""
    return [row.layer for row in layers(config) if row.full]


def summary(config: Config) -> dict[str, Any]:
    """What layers.json holds: the layers, which of them are full attention, and the totals."""
    table = layers(config)
    full = [row.layer for row in table if row.full]
    return {
        "pattern": config.model.pattern,
        "plan": str(model.build(config).layout),
        "num_layers": len(table),
        "num_full_layers": len(full),
        "full_layers": full,
        "parameters": parameters(config),
        "active_parameters": active_parameters(config),
        "state_bytes": sum(row.state_bytes for row in table),
        "cache_bytes": sum(row.cache_bytes for row in table),
        "seq_len": config.train.seq_len,
        "layers": [row._asdict() for row in table],
    }


def kept_bytes(definition: model.Definition, length: int) -> int:
    """What decoding keeps of a sequence of ``length`` tokens: states, keys and values of all layers."""
    costs = [spec.cost(definition.d_model, length) for spec in definition.layers]
    size = definition.dtype.itemsize
    return sum(round(STATE_BYTES * one.state) + round(size * one.cache) for one in costs)


def parameters(config: Config) -> int:
    """Every parameter of the model, embedding and head included."""
    return sum(math.prod(leaf.shape) for leaf in model.shapes(model.build(config)).values())


def active_parameters(config: Config) -> int:
    """Parameters that a token touches: all but those of the experts that it is not routed to."""
    definition = model.build(config)
    return parameters(config) - sum(spec.mlp_config.idle(definition.d_model) for spec in definition.layers)


def train_flops_per_token(config: Config) -> float:
    """Forward and backward FLOPs per token at train.seq_len, rows of one document each.

    2 per active parameter but the embedding (looked up), in each layer that uses it, and what the mixers' own
    costs say: recurrences, and softmax attention over the context that a causal token sees, (T + 1) / 2 on
    average.
    """
    definition, seq_len = model.build(config), config.train.seq_len
    looked_up = 0 if definition.model.tie_embeddings else definition.vocab_size * definition.d_model
    modules = _modules(definition)
    again = sum(modules.get(spec.mixer, 0) for spec in definition.layers) - sum(modules.values())
    forward = 2.0 * (active_parameters(config) - looked_up + again)
    forward += sum(spec.cost(definition.d_model, seq_len).flops for spec in definition.layers)
    return 3 * forward


def memory(config: Config, mesh: Mapping[str, int]) -> Memory:
    """Estimated bytes per device in training. mesh: axis -> size, without -1."""
    definition, train = model.build(config), config.train
    table, total = layers(config), parameters(config)
    in_blocks = sum(row.parameters for row in table)
    moments = 2 * total - (in_blocks if config.optimizer.name == "muon" else 0)  # Muon keeps one, AdamW two
    moments += total * (bool(config.optimizer.ema) + (not tame(config)))
    context = mesh.get("context", 1)
    shards = mesh["fsdp"] * mesh["tensor"] * context
    rows = train.batch_size / train.parts / (mesh["data"] * mesh["fsdp"])
    tokens = rows * train.seq_len / context
    # A projection of d_model * F parameters leaves F activations; copies before and after it triple that.
    work = [row.active_parameters / definition.d_model / mesh["tensor"] for row in table]
    inner = 2 * len(table) * config.model.mlp_hidden / mesh["tensor"]
    attended = sum(row.full for row in table) * definition.d_model / mesh["tensor"]
    kept = {"attention": attended, "mixer": inner, "dots": sum(work) + attended}
    kept |= {"kernels": 1.5 * sum(work), "most": 2 * sum(work), "none": 3 * sum(work)}
    elements = len(table) * definition.d_model + kept.get(definition.model.remat, 0.0)  # auto: at least
    vocab = definition.vocab_size / mesh["tensor"]
    logits = loss.temporaries(definition.d_model, int(vocab), int(tokens))
    one_layer = 3 * max(work) * tokens * definition.dtype.itemsize
    activations = tokens * elements * definition.dtype.itemsize + max(one_layer, logits)
    copies = 2 if train.microbatches > 1 else 1  # of the gradients: the sum so far and the next
    return Memory(4 * total / shards, copies * 4 * total / shards, 4 * moments / shards, activations)


def tame(config: Config) -> bool:
    """`optimizer.tame` of a resolved config."""
    factors = groups.factors(model.build(config), config.optimizer)
    return optimizer.tame(config.optimizer, config.optimizer.learning_rate, factors)


def matched_mlp_hidden(config: Config, target: int, multiple: int = 64) -> int:
    """The MLP width, a multiple of ``multiple``, that brings the `parameters` nearest to ``target``.

    For comparing mixers at equal depth, width and parameters: what one mixer's projections have more than
    another's, its MLPs have less.
    """
    per_unit = 3 * config.model.d_model * config.model.num_layers
    wanted = config.model.mlp_hidden + (target - parameters(config)) / per_unit
    return max(multiple, round(wanted / multiple) * multiple)


def _settings(spec: Spec) -> str:
    def changed(config: Settings) -> list[str]:
        own = {name: value for name, value in vars(config).items() if name not in ("kind", "part", "parts")}
        defaults = vars(type(config)())
        return [f"{name}={value}" for name, value in own.items() if value != defaults[name]]

    mlp = [] if spec.mlp_kind == mlps.DEFAULT else [f"mlp={spec.mlp_kind}", *changed(spec.mlp_config)]
    return ", ".join(changed(spec.config) + mlp)


def _modules(definition: model.Definition) -> Mapping[str, int]:
    """Parameters of the modules that all layers of a mixer's name go through, by that name."""
    names = {spec.mixer for spec in definition.layers if mixers.shares_module(spec.kind)}
    return {name: _size(definition, f"shared.{name}.") for name in names}


@functools.lru_cache(maxsize=256)
def _size(definition: model.Definition, start: str) -> int:
    """Parameters whose names begin so."""
    leaves = model.canonical_shapes(definition).items()
    return sum(math.prod(leaf.shape) for name, leaf in leaves if name.startswith(start))
