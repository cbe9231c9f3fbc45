"""Every section of a config: its fields, their types, defaults, limits and meaning.

A section is a frozen dataclass. Limits that concern one field are part of its type; those that concern
several are in ``check``, which raises a ConfigError with a field relative to the section. `hybridlm.config`
reads these classes, and the ``Config`` of each kind of mixer and data in the same way.
"""

import dataclasses
import functools
import math
import types
import typing
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from hybridlm.errors import ConfigError


class Limits(NamedTuple):
    low: float = float("-inf")
    high: float = float("inf")

    def __str__(self) -> str:
        if self.high == float("inf"):
            return f"at least {self.low:g}"
        return f"between {self.low:g} and {self.high:g}"


Positive = Annotated[int, Limits(1)]
Count = Annotated[int, Limits(0)]
NonNegative = Annotated[float, Limits(0)]
Fraction = Annotated[float, Limits(0, 1)]


@dataclasses.dataclass(frozen=True)
class Model:
    """pattern: layers as mixer names (`hybridlm.pattern`), repeated to fill ``num_layers``; 0: as written.
    mlp_hidden: SwiGLU width; 0: 8/3 d_model rounded up to a multiple of 256, as in FLA and Llama.
    norm_unit_offset: layer and final norms scale by 1 + their parameter (Qwen3-Next, Gemma).
    post_norm: names of mixers whose blocks norm what mixer and MLP return, not what they are given (OLMo 2).
    dtype: of activations; parameters, recurrent states and the loss are float32.
    remat: what the backward pass recomputes in each layer: none, full (all of it), dots (all but matmuls),
        mixer (all but the MLP's first matmuls). What is kept costs memory, what is recomputed time.
    scan: False unrolls the stack, for debugging; compile time then grows with depth.
    """

    pattern: str = "kda*3 full"
    num_layers: Count = 0
    d_model: Positive = 1024
    vocab_size: Annotated[int, Limits(2)] = 32000
    mlp_hidden: Count = 0
    norm_eps: Annotated[float, Limits(0)] = 1e-6
    norm_unit_offset: bool = False
    post_norm: tuple[str, ...] = ()
    tie_embeddings: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["none", "full", "dots", "mixer"] = "full"
    scan: bool = True


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """name: adamw, or muon (hidden matrices by Muon, everything else by AdamW, one learning rate).
    final_ratio: learning rate at the end over the peak.  decay_fraction: part of the run that wsd decays in.
    weight_decay: decoupled, times the learning rate; never on norms, biases, A_log, dt_bias.
    clip_norm: global gradient norm; 0 does not clip.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: Annotated[float, Limits(0)] = 1e-3
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Count = 0
    final_ratio: Fraction = 0.1
    decay_fraction: Fraction = 0.1
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.1
    clip_norm: NonNegative = 1.0
    muon_momentum: Fraction = 0.95


@dataclasses.dataclass(frozen=True)
class Train:
    """steps: optimiser updates.  batch_size: sequences per update, over all devices and microbatches.
    seq_len: tokens per sequence.  microbatches: parts of a batch whose gradients are accumulated.
    z_loss: weight of log(Z)^2 per token (PaLM, section 5).
    max_skipped: updates in a row that are skipped for a loss or gradient that is not finite; one more ends
        the run.
    max_minutes: wall-clock time after which the run saves and leaves, to be resumed; 0: no limit.
    """

    steps: Positive = 1000
    batch_size: Positive = 32
    seq_len: Positive = 1024
    seed: Count = 0
    microbatches: Positive = 1
    z_loss: NonNegative = 0.0
    max_skipped: Count = 8
    max_minutes: NonNegative = 0.0

    def check(self) -> None:
        if self.batch_size % self.microbatches:
            raise ConfigError(
                "microbatches", self.microbatches, f"must divide train.batch_size = {self.batch_size}"
            )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each mesh axis; -1 (at most once) takes what the others leave.

    data: replicas.  fsdp: parameters and optimiser state sharded.  tensor: heads, MLP and vocabulary sharded.
    """

    data: Annotated[int, Limits(-1)] = -1
    fsdp: Annotated[int, Limits(-1)] = 1
    tensor: Annotated[int, Limits(-1)] = 1

    def check(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size == 0:
                raise ConfigError(name, size, "must be at least 1, or -1 for the remaining devices")
        if list(sizes.values()).count(-1) > 1:
            raise ConfigError("data", self.data, "only one mesh axis can be -1, the remaining devices")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """every_steps: 0 saves at the end only.  keep_last: newest checkpoints kept.
    keep_best: checkpoints kept beside them for the lowest ``best_metric``.
    """

    every_steps: Count = 1000
    keep_last: Positive = 2
    keep_best: Count = 1
    best_metric: Literal["val_loss", "loss"] = "val_loss"


@dataclasses.dataclass(frozen=True)
class Log:
    """every_steps: between lines of metrics.jsonl.
    wandb_mode: online needs a key (or ``wandb login``) and is offline without one.
    project, name: of the run in W&B; an empty name is the workdir's.
    """

    every_steps: Positive = 10
    wandb_mode: Literal["online", "offline", "disabled"] = "disabled"
    project: str = "hybridlm"
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Eval:
    """every_steps: between validations; 0 validates at the end only.  batches: of held-out data, each time.
    tasks: of `python -m eval --list`, measured beside each validation, at ``task_lengths`` tokens (none:
        train.seq_len) on ``task_samples`` samples.
    sample_every_steps: 0 samples at the end only.  sample_tokens: 0 never samples.
    sample_prompt: text; temperature: 0 is greedy.
    """

    every_steps: Count = 500
    batches: Positive = 16
    tasks: tuple[str, ...] = ()
    task_lengths: tuple[int, ...] = ()
    task_samples: Positive = 64
    sample_every_steps: Count = 0
    sample_prompt: str = ""
    sample_tokens: Count = 0
    temperature: NonNegative = 1.0


SECTIONS: dict[str, type] = {
    "model": Model,
    "optimizer": Optimizer,
    "train": Train,
    "mesh": Mesh,
    "checkpoint": Checkpoint,
    "log": Log,
    "eval": Eval,
}


@functools.cache
def fields(section: type) -> dict[str, Any]:
    """Name and annotation of every field of a dataclass."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def describe(kind: Any) -> str:
    """What a field of annotation ``kind`` accepts, in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return " ".join([describe(args[0]), *map(str, args[1:])])
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(describe, args))
    if origin is tuple:
        return f"a tuple of {describe(args[0])} each"
    return {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "a string",
        type(None): "None",
    }[kind]


def convert(kind: Any, value: Any) -> Any:
    """``value`` as annotation ``kind`` wants it; ValueError when it does not fit.

    Exact but for what Python itself treats as the same: an int serves as a float, a list as a tuple.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = convert(args[0], value)
        for limits in args[1:]:
            if not limits.low <= value <= limits.high:
                raise ValueError(f"must be {limits}")
        return value
    if origin is Literal and value in args and type(value) is type(args[args.index(value)]):
        return value
    if origin in (types.UnionType, typing.Union):
        for arg in args:
            try:
                return convert(arg, value)
            except ValueError:
                continue
    elif origin is tuple and isinstance(value, tuple | list):
        return tuple(convert(args[0], element) for element in value)
    elif kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif kind is not float and type(value) is kind:
        return value
    raise ValueError(f"must be {describe(kind)}")


def parse(kind: Any, text: str) -> Any:
    """The value of annotation ``kind`` that ``text`` on a command line means; ValueError if it means none."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return convert(kind, parse(args[0], text))
    if origin is Literal:
        return convert(kind, next((arg for arg in args if str(arg) == text), text))
    if origin in (types.UnionType, typing.Union):
        for arg in args:
            try:
                return parse(arg, text)
            except ValueError:
                continue
    elif origin is tuple:
        parts = [part.strip() for part in text.strip("()[] ").split(",")]
        return tuple(parse(args[0], part.strip("'\"")) for part in parts if part)
    elif kind is str:
        return text
    elif kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif kind is type(None) and text.lower() == "none":
        return None
    elif kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise ValueError(f"must be {describe(kind)}")
