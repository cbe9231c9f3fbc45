"""Every section of a config: its fields, their types, defaults, limits and meaning.

A section is a frozen dataclass (`hybridlm.fields` has the idiom); what concerns several fields is in
``check``, which raises a ConfigError with a field relative to the section. The kinds of mixers, MLPs, data
and objectives describe their own settings in the same way, each in its ``Config``.
"""

import dataclasses
import math
import re
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from hybridlm.errors import ConfigError
from hybridlm.fields import INT32, Above, Count, Epsilon, Fraction, Limits, NonNegative, Positive

FACTOR = r"(?:[0-9]{1,5}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]-[0-9]{1,2})?"
Axis = Annotated[int, Limits(-1, INT32)]
Memory = Annotated[float, Limits(0, 0.999999)]  # of a moving average; with 1 it never takes anything in


def pairs(
    field: str, given: tuple[str, ...], first: str, second: str, fix: str
) -> list[tuple[str, float, float]]:
    """(pattern, number, number) of each "PATTERN=FIRST" or "PATTERN=FIRST/SECOND" of a field; SECOND is 1
    where it is not said. fix: what the error recommends."""
    found = []
    for text in given:
        match = re.fullmatch(rf"([^=]+)=({FACTOR})(?:/({FACTOR}))?", text.replace(" ", ""))
        if not match:
            raise ConfigError(field, text, f"must be PATTERN={first} or PATTERN={first}/{second}", fix)
        found.append((match[1], float(match[2]), float(match[3] or 1)))
    return found


@dataclasses.dataclass(frozen=True)
class Model:
    """pattern: layers as mixer names (`hybridlm.pattern`), repeated to fill ``num_layers``.
    num_layers: 0: as many as the pattern has.  d_model: width of the residual stream.
    vocab_size: ids of the embedding, at least those of the data.  norm_eps: of layer and final norms.
    tie_embeddings: the embedding is the output head too.
    mlp_hidden: SwiGLU width; 0: 8/3 d_model rounded up to a multiple of 256, as in FLA and Llama.
    norm: of layers and at the end: rms, or layer (LayerNorm with a bias; RWKV).
    embedding_norm: such a norm of the embedding, too (RWKV).
    norm_unit_offset: layer and final norms scale by 1 + their parameter (Qwen3-Next, Gemma).
    post_norm: names of mixers whose blocks norm what mixer and MLP return, not what they are given (OLMo 2).
    stream_norm: "PATTERN=STREAM" or "PATTERN=STREAM/ADDED": halves of blocks that norm the stream itself, and
        weigh it and what they add: x = norm(x), then STREAM x + ADDED f(x) (DeepNorm, MiniMax-01; *=1: the
        post-norm of the first transformers), by patterns of full.mixer, full.mlp ...; the last match counts.
    dtype: of activations; parameters, recurrent states and the loss are float32.
    matmul: what the large products of a training step's layers are computed in: dtype, or fp8
        (`hybridlm.scaled_matmul`), for GPUs that have it. Left out: embedding, head, gates, decays, routers,
        experts, low ranks, recurrences, attention, and all that is not training.
    remat: what the backward pass recomputes in each layer: none, full (all of it), attention (all but softmax
        attention), dots (all but that and matmuls), kernels (all but these and recurrences), most (next to
        nothing: norms, activations, short convolutions and decays are kept, too), mixer (all but softmax
        attention and the MLP's first matmuls). What is kept costs memory, what is recomputed time. auto: the
        fastest of most, kernels, dots, mixer, attention and full that fits, found by compiling; on a GPU it
        unrolls the stack for the first four.
    scan: False unrolls the stack: faster on a GPU where remat is most, kernels, dots or mixer, but compile
        time grows with depth.
    lora: "PATTERN=RANK" or "PATTERN=RANK/ALPHA": matrices of layers that are frozen and get low-rank factors
        (`hybridlm.lora`), by patterns of names as in ``optimizer.freeze``; the last that matches counts.
    embedding_multiplier: of the embedding where it enters the stack (Granite; Gemma: the root of d_model).
    residual_multiplier: of what every mixer and MLP adds to the stream (Granite).
    logit_divisor: what logits are divided by (Granite's logits_scaling).
    logit_cap: logits stay within it, cap * tanh(logits / cap); 0: no cap (xLSTM 7B has 30).
    mup_base_width: muP (`hybridlm.mup`): the ``d_model`` whose learning rate and decay serve this one too;
        0: the standard parametrisation.
    """

    pattern: str = "kda*3 full"
    num_layers: Count = 0
    d_model: Positive = 1024
    vocab_size: Annotated[int, Limits(2, INT32)] = 32000
    mlp_hidden: Count = 0
    norm_eps: Epsilon = 1e-6
    norm: Literal["rms", "layer"] = "rms"
    embedding_norm: bool = False
    norm_unit_offset: bool = False
    post_norm: tuple[str, ...] = ()
    stream_norm: tuple[str, ...] = ()
    tie_embeddings: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    matmul: Literal["dtype", "fp8"] = "dtype"
    remat: Literal["none", "full", "attention", "dots", "mixer", "kernels", "most", "auto"] = "full"
    scan: bool = True
    lora: tuple[str, ...] = ()
    embedding_multiplier: Above = 1.0
    residual_multiplier: Above = 1.0
    logit_divisor: Above = 1.0
    logit_cap: NonNegative = 0.0
    mup_base_width: Count = 0

    def check(self) -> None:
        self.streams()
        if self.matmul == "fp8" and self.dtype != "bfloat16":
            problem = f"rounds to 8 bits what model.dtype={self.dtype} keeps"
            raise ConfigError("matmul", self.matmul, problem, "Set model.dtype=bfloat16, or matmul=dtype.")

    def streams(self) -> list[tuple[str, float, float]]:
        """(pattern, weight of the stream, of what is added) of each of ``stream_norm``."""
        fix = "For example *=1, or *.mlp=3.5/1."
        found = pairs("stream_norm", self.stream_norm, "STREAM", "ADDED", fix)
        if any(not weight for _, *weights in found for weight in weights):
            raise ConfigError("stream_norm", self.stream_norm, "must have weights above 0", fix)
        return found

    def stream(self, half: str) -> tuple[float, float] | None:
        """The weights of a half of blocks, such as full.mlp; None where it norms no stream."""
        hits = [weights for one, *weights in self.streams() if fnmatchcase(half, one)]
        return (hits[-1][0], hits[-1][1]) if hits else None


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """name: adamw, or muon (hidden matrices by Muon, everything else by AdamW, one learning rate).
    learning_rate: at the peak.  schedule: cosine or wsd (constant, then linear decay) down to final_ratio, or
        constant.  warmup_steps: of linear growth to it.
    final_ratio: learning rate at the end over the peak.  decay_fraction: part of the run that wsd decays in.
    weight_decay: decoupled, times the learning rate; never on norms, biases, A_log, dt_bias.
    clip_norm: global gradient norm; 0 does not clip.
    qk_clip: attention logit above which a head's query and key projections are scaled down after the update
        (with muon: MuonClip; Kimi K2 has 100); 0: none.
    b1, b2, eps: of AdamW.  muon_momentum: of Muon, Nesterov's.
    freeze: patterns (* is anything) of parameters' names that are not trained and have no optimiser state:
        embedding, layers.*.mlp.*, layers.0.* ...; "!PATTERN" takes out again: ("*", "!*.lora_?").
    groups: "PATTERN=LR" or "PATTERN=LR/DECAY", patterns as in ``freeze``: by what the learning rate, and the
        weight decay beside it, are multiplied for parameters of those names; the last that matches counts.
    ema: decay of the exponential moving average of the weights that is kept beside them, validated with them
        (metrics ema/val_loss ...) and taken on request (generate and export --ema, init_from "DIR:ema");
        0: none is kept.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: NonNegative = 1e-3
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Count = 0
    final_ratio: Fraction = 0.1
    decay_fraction: Fraction = 0.1
    b1: Memory = 0.9
    b2: Memory = 0.95
    eps: Annotated[float, Limits(1e-30, 1e9)] = 1e-8  # of float32, and above 0 there
    weight_decay: NonNegative = 0.1
    clip_norm: NonNegative = 1.0
    muon_momentum: Memory = 0.95
    qk_clip: NonNegative = 0.0
    freeze: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    ema: Memory = 0.0

    def check(self) -> None:
        self.multipliers()

    def multipliers(self) -> list[tuple[str, float, float]]:
        """(pattern, of the learning rate, of the weight decay) of each of ``groups``."""
        fix = "For example layers.*.mlp.*=0.5, or embedding=0.1/0 for no decay."
        return pairs("groups", self.groups, "LR", "DECAY", fix)


@dataclasses.dataclass(frozen=True)
class Train:
    """steps: optimiser updates.  batch_size: sequences per update, over all devices and microbatches.
    seq_len: tokens per sequence.  seed: of parameters, order of the data and samples.
    microbatches: parts of a batch whose gradients are accumulated. The curve is the same but for rounding,
        and for balance losses (experts, MoM, SSE), which are of each part by itself. 0, with
        model.remat=auto: the fewest with which a device's memory has room for the outputs of projections,
        found when the step is traced.
    max_skipped: updates in a row that are skipped for a loss or gradient that is not finite, or for being so;
        one more ends the run.
    max_minutes: wall-clock time after which the run saves and leaves, to be resumed; 0: no limit.
    compilation_cache: folder that keeps compiled programs for the next start; "auto": in the user's cache
        folder ($XDG_CACHE_HOME), "": none. $JAX_COMPILATION_CACHE_DIR goes before it.
    xla_triton: what XLA may make with Triton on a GPU: products of matrices, and norms and softmaxes whole
        ("norms"); all of it or none. With less the step compiles sooner, and rounds otherwise
        (docs/first_step.md); with model.matmul=fp8 there are no products of its own in any case.
    profile_steps: the first and the last step (from 1) of a window that JAX's profiler watches: a table of
        where their time went, and the trace, in ``profile/`` of the workdir; (): none.
    """

    steps: Positive = 1000
    batch_size: Positive = 32
    seq_len: Positive = 1024
    seed: Annotated[int, Limits(0, 2**63 - 1)] = 0
    microbatches: Count = 1
    max_skipped: Count = 8
    max_minutes: NonNegative = 0.0
    compilation_cache: str = "auto"
    xla_triton: Literal["all", "products", "norms", "none"] = "all"
    profile_steps: tuple[int, ...] = ()

    def check(self) -> None:
        if self.batch_size % self.parts:
            problem = f"must divide train.batch_size = {self.batch_size}"
            raise ConfigError("microbatches", self.microbatches, problem)
        window = self.profile_steps
        if window and not (len(window) == 2 and 1 <= window[0] <= window[1] <= self.steps):
            problem = f"must be the first and the last step of a window in 1 to train.steps = {self.steps}"
            raise ConfigError("profile_steps", window, problem, "For example 10, 12.")

    @property
    def parts(self) -> int:
        """``microbatches``; before they are chosen 1."""
        return self.microbatches or 1


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each mesh axis; -1 (at most once) takes what the others leave.

    data: replicas.  fsdp: parameters and optimiser state sharded.  tensor: heads, MLP and vocabulary sharded.
    context: sequences cut; parameters and optimiser state sharded as by fsdp.
    overlap: on several GPUs, settings of XLA that let more exchanges go on beside computing
        (`compiler.OVERLAP`): 1% more tokens/s on four GPUs, within the noise (docs/scaling.md).
    """

    data: Axis = -1
    fsdp: Axis = 1
    tensor: Axis = 1
    context: Axis = 1
    overlap: bool = False

    def sizes(self) -> dict[str, int]:
        """By axis; context only where sequences may be cut."""
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor, "context": self.context}
        return {name: size for name, size in sizes.items() if name != "context" or size != 1}

    def over(self, devices: int) -> dict[str, int]:
        """`sizes` with -1 put in for ``devices`` devices; at least 1, if the others want more than those."""
        sizes = self.sizes()
        fixed = math.prod(size for size in sizes.values() if size != -1)
        return {axis: max(1, devices // fixed) if size == -1 else size for axis, size in sizes.items()}

    def check(self) -> None:
        sizes = self.sizes()
        for name, size in sizes.items():
            if size == 0:
                raise ConfigError(name, size, "must be at least 1, or -1 for the remaining devices")
        if list(sizes.values()).count(-1) > 1:
            raise ConfigError("data", self.data, "only one mesh axis can be -1, the remaining devices")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """every_steps: 0 saves at the end only.  keep_last: newest checkpoints kept.
    keep_best: checkpoints kept beside them for the lowest ``best_metric``.
    best_metric: loss on held-out data, or of the training batch.
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
    tensorboard: the same numbers as TensorBoard's event files, in ``tensorboard/`` of the workdir; needs the
        extra of that name.
    """

    every_steps: Positive = 10
    wandb_mode: Literal["online", "offline", "disabled"] = "disabled"
    project: str = "hybridlm"
    name: str = ""
    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class Eval:
    """every_steps: between validations; 0 validates at the end only.  batches: of held-out data, each time.
    tasks: of `python -m eval --list`, measured beside each validation.
    task_lengths: tokens of their contexts; none: train.seq_len.  task_samples: of each task and length.
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
    section.__name__.lower(): section for section in (Model, Optimizer, Train, Mesh, Checkpoint, Log, Eval)
}
