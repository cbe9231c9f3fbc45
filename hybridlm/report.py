"""What is shown of a config: its layer table, and the whole of a dry run."""

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from hybridlm import ahead, cost, data, groups, lent, member, stages
from hybridlm import config as configs
from hybridlm.config import Config
from hybridlm.data import mixture
from hybridlm.errors import ConfigError
from hybridlm.run import show


def layer_table(config: Config) -> Table:
    """One row a layer of a resolved config; full-attention layers are marked.

    The settings that differ from the kind's defaults stand at the first layer of each name.
    """
    title = f"{config.model.num_layers} layers: {cost.summary(config)['plan']}"
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    table.add_column("layer", justify="right")
    for column in ("name", "kind"):
        table.add_column(column, no_wrap=True)
    table.add_column("settings", overflow="fold")
    for column in ("parameters", "state", "KV cache"):
        table.add_column(column, justify="right", no_wrap=True)
    shown: set[str] = set()
    for row in cost.layers(config):
        settings = "" if row.name in shown else row.settings.replace(", ", "\n")
        shown.add(row.name)
        table.add_row(
            str(row.layer),
            row.name,
            f"{row.kind} (full)" if row.full else row.kind,
            settings,
            f"{row.parameters:,}",
            quantity(row.state_bytes, "B") if row.state_bytes else "",
            quantity(row.cache_bytes, "B") if row.cache_bytes else "",
        )
    return table


def full_layers(config: Config) -> str:
    """The number and the indices of the full-attention layers, in a line: a ratio alone is ambiguous."""
    indices = cost.full_layers(config)
    listed = f": {', '.join(map(str, indices))}" if indices else ""
    return f"full attention: {len(indices)} of {config.model.num_layers} layers (counted from 0){listed}"


def dry_run(config: Config, console: Console, devices: str = "") -> None:
    """Prints what a resolved config amounts to on this machine's devices; touches no file but the data's.

    devices: "h100:64", GPUs that are not there: the step is compiled for them.

    ConfigError for a batch that the mesh cannot split. Missing data are reported, not refused: they may be on
    another machine.
    """
    mesh = config.mesh.over(ahead.parse(devices) if devices else jax.device_count())
    configs.check_batch(config.train, mesh)
    groups.check(config)
    show.line(configs.to_yaml(config), console)
    console.print(layer_table(config))
    for name, value in facts(config, mesh).items():
        show.line(f"{name:<28} {value}", console)
    show.line(full_layers(config), console)
    for name, value in compiled(config, devices).items() if devices else ():
        show.line(f"{name:<28} {value}", console)


def compiled(config: Config, devices: str) -> dict[str, str]:
    """What the step, or that of each stage, takes on ``devices``, as name -> text."""
    found: dict[str, str] = {}
    parts = [one for _, one in stages.split(config, configs.resolve)]
    names = [f"{name}: " for name in config.stages.get(stages.ORDER, ())] or [""]
    for count, name in enumerate(names, 1):
        needs = ahead.needs(parts[count - 1], devices, lent.names(parts[:count]))
        found |= {name + said: value for said, value in ahead.lines(needs, devices).items()}
    return found


def facts(config: Config, mesh: dict[str, int]) -> dict[str, str]:
    """What is worth knowing before a run, as name -> text."""
    summary, train, memory = cost.summary(config), config.train, cost.memory(config, mesh)
    tokens, flops = train.batch_size * train.seq_len, cost.train_flops_per_token(config)
    total = stages.tokens(stages.parts(config, configs.resolve))
    idle = summary["parameters"] != summary["active_parameters"]
    active = f", of which a token touches {summary['active_parameters']:,}" if idle else ""
    parts = ", ".join(f"{name} {quantity(size, 'B')}" for name, size in memory._asdict().items())
    parts += "" if train.microbatches else "; of a whole batch, before train.microbatches=0 is found out"
    return {
        "parameters": f"{summary['parameters']:,}" + active,
        "decode state per sequence": quantity(summary["state_bytes"], "B"),
        "KV cache per sequence": f"{quantity(summary['cache_bytes'], 'B')} at {train.seq_len:,} tokens",
        "training FLOPs per token": f"{quantity(flops, 'FLOP')} at {train.seq_len:,} tokens",
        "tokens": ("" if config.stages else f"{tokens:,} a step, ")
        + f"{quantity(total, '')} in {train.steps:,} steps, {quantity(flops * total, 'FLOP')}",
        "mesh": " x ".join(f"{axis} {size}" for axis, size in mesh.items()),
        "memory per device, estimate": f"{quantity(sum(memory), 'B')} ({parts})",
        "training data": _data(config, "train"),
        "held-out data": _data(config, "val"),
        **{f"val.{name}": _data(config, "val", name) for name in config.val},
    }


def _data(config: Config, split: str, name: str = "") -> str:
    try:
        dataset = member.build_data(config, split, name=name)
    except ConfigError as error:
        return f"not usable here: {error}"
    return amount(config, dataset) if split == "train" else dataset.source.describe()


def amount(config: Config, dataset: data.Dataset) -> str:
    """How much there is to train on, and how often the run reads it."""
    train = config.train
    read = stages.tokens(stages.parts(config, configs.resolve))
    said = f"{dataset.source.describe()}; the run reads {quantity(read, '')} tokens"
    rows = read / train.seq_len
    if isinstance(dataset.source, mixture.Mixture):
        each = dataset.source.epochs(rows).items()
        return said + "".join(f", {name} {count:.3g} epochs" for name, count in each)
    return said + (f", {rows / dataset.num_rows:.3g} epochs" if dataset.num_rows else "")


def quantity(value: float, unit: str) -> str:
    """Three digits and a decimal prefix: 1.23 GB."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()
