"""Learning from a teacher: a weighted sum of next-token prediction, KL of logits, alignment of hidden states
and transfer of what each mixer returns. One pass of each model serves all the terms.

    next_token    cross-entropy of the data
    kl            t^2 KL(teacher || student) of the logits
    hidden        mean over layers of 1 - cosine of the residual streams after them
    transfer      mean over the layers whose mixer is another than the teacher's, and over channels, of
                  (student's mixer output - teacher's)^2: attention transfer (LoLCATs, arXiv 2410.10254);
                  or, by cosine, 1 - cosine of the two
    weights       mean over those layers and heads of the cross-entropy of the student's weights of each token
                  in the past, of kind feature_map, from the teacher's (Hedgehog; `hybridlm.mimicry`)
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from hybridlm import distillation, init_from, mimicry, mixers, mup, objectives, plan
from hybridlm import model as lm
from hybridlm.errors import ConfigError
from hybridlm.fields import Above, Count, NonNegative
from hybridlm.mixers import attention, feature_map
from hybridlm.objectives import TEACHER, Batch, Sums
from hybridlm.objectives.next_token import AUXILIARY, joined
from hybridlm.rows import Rows

INPUT, MIXED, OUTPUT = "block.input", "block.mixed", "block.output"  # records of every layer
FEATURES = "features.q", "features.k"  # of kind feature_map


@dataclasses.dataclass(frozen=True)
class Config(objectives.Config):
    """teacher: a run's workdir or a Hugging Face folder; its parameters stay as they are.
    next_token, kl, hidden, transfer, weights: weights of the terms.
    transfer_by: what the transfer is measured by.
    temperature: of both models' logits in the KL.  top_k: largest logits of the teacher that it sees; 0: all.
    inputs: what the layers see in transfer and weights: "teacher", what the teacher's layers saw, so that
        each learns alone, or "student", what the student's own layers before them return.
    """

    teacher: str = ""
    next_token: NonNegative = 0.0
    kl: NonNegative = 1.0
    hidden: NonNegative = 0.0
    transfer: NonNegative = 0.0
    transfer_by: Literal["square", "cosine"] = "square"
    weights: NonNegative = 0.0
    temperature: Above = 1.0
    top_k: Count = 0
    inputs: Literal["teacher", "student"] = "teacher"

    def check(self) -> None:
        if not self.teacher:
            raise ConfigError("teacher", "", "must name a run's workdir or a Hugging Face folder")
        if not (self.next_token or self.kl or self.hidden or self.by_layer):
            raise ConfigError("kl", 0.0, "next_token, kl, hidden, transfer and weights cannot all be 0")

    @property
    def by_layer(self) -> bool:
        """Whether layers learn from layers."""
        return bool(self.transfer or self.weights)


class Objective(objectives.Objective):
    """sums: those of next_token where the student runs as a whole, and "kl_loss_sum", "hidden_loss_sum",
    "transfer_loss_sum" and "weights_loss_sum" of the terms with a weight. Where every layer learns alone
    nothing is predicted, and "loss_sum" is of the last two; a validation always runs the student, and has
    these two of each layer."""

    config_class = Config
    config: Config
    terms = "kl_", "hidden_", "transfer_", "weights_"

    def __init__(self, config: Config, definition: lm.Definition, token_bytes: jax.Array | None = None):
        super().__init__(config, definition, token_bytes)
        theirs = lm.build(init_from.described(config.teacher, "objective.teacher"))
        model = dataclasses.replace(theirs.model, dtype=definition.model.dtype, remat="none")
        # What the student does not train can be the teacher's too, stacked as it is there (`hybridlm.lent`).
        held = any(spec.frozen for spec in definition.layers)
        layout = plan.like(definition.layout, theirs.layers) if held else theirs.layout
        self.teacher: lm.Definition = dataclasses.replace(theirs, model=model, layout=layout)
        pairs = zip(theirs.layers, definition.layers, strict=False)
        self.changed = [i for i, (one, other) in enumerate(pairs) if one.config != other.config]
        self._check()

    def _check(self) -> None:
        ours, theirs, config = self.definition, self.teacher, self.config
        refuse = lambda problem: ConfigError("objective.teacher", config.teacher, problem)
        if theirs.vocab_size != ours.vocab_size:
            raise refuse(f"has {theirs.vocab_size} tokens, this model {ours.vocab_size}")
        if config.top_k > ours.vocab_size:
            raise ConfigError("objective.top_k", config.top_k, f"must be at most {ours.vocab_size}")
        sizes = [(one.d_model, len(one.layers)) for one in (theirs, ours)]
        if (config.hidden or config.by_layer) and sizes[0] != sizes[1]:
            told = "width and depth must be equal for hidden, transfer and weights"
            raise refuse(f"has (d_model, layers) {sizes[0]}, this model {sizes[1]}: {told}")
        if config.by_layer and not self.changed:
            raise refuse("has the mixers of this model: there is nothing to transfer")
        for i in self.changed if config.weights else ():
            if not _comparable(theirs.layers[i].config, ours.layers[i].config, ours.d_model):
                told = f"layer {i} must be a positive feature_map of as many heads, with normalizer=sum,"
                problem = f"{told} in the place of full attention without forget_gate and sinks"
                raise ConfigError("objective.weights", config.weights, problem)

    def evaluate(self, params: lm.Params, frozen: lm.Params, batch: Batch) -> Sums:
        return self.loss(params, frozen, batch, training=False)[1]

    def loss(
        self,
        params: lm.Params,
        frozen: lm.Params,
        batch: Batch,
        wanted: tuple[str, ...] = (),
        training: bool = True,
    ) -> tuple[jax.Array, Sums]:
        config, tokens, counted = self.config, batch["tokens"], batch["targets"] >= 0
        forced = config.by_layer and config.inputs == "teacher"  # each layer is given the teacher's inputs
        alone = training and forced and not (config.next_token or config.kl or config.hidden)
        rows = Rows(batch["segment_ids"], batch["positions"])
        theirs = {n.removeprefix(TEACHER): leaf for n, leaf in frozen.items() if n.startswith(TEACHER)}
        own = {name: leaf for name, leaf in frozen.items() if not name.startswith(TEACHER)}
        student, teacher = lm.merge(self.definition, params | own), lm.merge(self.teacher, theirs)
        mixed = [MIXED] * bool(config.transfer)
        taps = [OUTPUT] * bool(config.hidden) + mixed
        given = [*taps, *[INPUT] * forced, *["q", "k"] * bool(config.weights)]
        seen, before = jax.lax.stop_gradient(teacher.forward(tokens, rows, tuple(given)))
        mixed += [*FEATURES] * bool(config.weights)
        total = jnp.zeros((), jnp.float32)
        sums: Sums = {"tokens": jnp.sum(counted.astype(jnp.float32))}
        records: lm.Records = {}
        if not alone:
            hidden, records = student.forward(tokens, rows, (AUXILIARY + "*", *taps, *mixed, *wanted))
            head, targets = student.head_matrix(), batch["targets"]
            known = distillation.Teacher(seen, teacher.head_matrix())
            caps = self.definition.model.logit_cap, self.teacher.model.logit_cap
            weights = distillation.Weights(
                config.next_token, config.kl, config.temperature, config.top_k, caps
            )
            part, (found, kl) = distillation.distilled(hidden, head, known, targets, weights)
            part, more = joined(part, found.tokens, records, targets, self.token_bytes)
            sums |= {"loss_sum": found.cross_entropy, "correct": found.correct} | more
            sums |= {"kl_loss_sum": kl} if config.kl else {}
            total += part
        if config.hidden:
            layers = range(len(self.definition.layers))
            apart = [_angle(_of(i, OUTPUT, records), _of(i, OUTPUT, before), counted) for i in layers]
            sums["hidden_loss_sum"] = jnp.mean(jnp.stack(apart))
            total += config.hidden * sums["hidden_loss_sum"]
        if config.by_layer:
            after = records
            if forced:
                inputs = jnp.stack([before[f"layers.{i}.{INPUT}"] for i in range(len(self.teacher.layers))])
                _, after = student.forward(tokens, rows, (*mixed, *(wanted if alone else ())), inputs)
                records = records or after
            for name, weight, each in self._apart(before, after, rows, counted):
                sums[f"{name}_loss_sum"] = jnp.mean(each)
                total += weight * sums[f"{name}_loss_sum"]
                if not training:
                    sums |= {f"{name}_{i}_loss_sum": each[at] for at, i in enumerate(self.changed)}
        sums.setdefault("loss_sum", jax.lax.stop_gradient(total))
        if wanted:
            sums["records"] = {n: one for n, one in records.items() if n.split(".", 2)[2] in wanted}
        return total, sums

    def _apart(
        self, before: lm.Records, after: lm.Records, rows: Rows, counted: jax.Array
    ) -> Iterator[tuple[str, float, jax.Array]]:
        """(name, weight, sums [layers that changed]) of the terms in which layers learn from layers."""
        config = self.config
        if config.transfer:
            distance = _square if config.transfer_by == "square" else _angle
            apart = [distance(_of(i, MIXED, after), _of(i, MIXED, before), counted) for i in self.changed]
            yield "transfer", config.transfer, jnp.stack(apart)
        if config.weights:
            every = lambda name, records: jnp.stack([records[f"layers.{i}.{name}"] for i in self.changed])
            theirs = mimicry.Heads(every("q", before), every("k", before))
            ours = mimicry.Heads(*(every(name, after) for name in FEATURES))
            scale = mup.logit_scale(theirs.q.shape[-1], bool(self.teacher.model.mup_base_width))
            yield "weights", config.weights, mimicry.cross_entropy(theirs, ours, rows, counted, scale)


def _comparable(theirs: mixers.Config, ours: mixers.Config, d_model: int) -> bool:
    """Whether both say how much each token has of each before it."""
    if not (isinstance(theirs, attention.Config) and isinstance(ours, feature_map.Config)):
        return False
    plain = not (theirs.window or theirs.forget_gate or theirs.sinks or theirs.logit_scale or theirs.yarn)
    plain = plain and ours.feature_map not in ("identity", "elementwise_product")  # which may be negative
    return plain and ours.normalizer == "sum" and theirs.heads(d_model)[0] == ours.heads(d_model).num


def _of(layer: int, name: str, records: lm.Records) -> jax.Array:
    return records[f"layers.{layer}.{name}"].astype(jnp.float32)


def _square(ours_BTD: jax.Array, theirs_BTD: jax.Array, counted_BT: jax.Array) -> jax.Array:
    """Sum over the counted tokens of the mean square difference of channels."""
    return jnp.sum(jnp.where(counted_BT, jnp.mean(jnp.square(ours_BTD - theirs_BTD), axis=-1), 0))


def _angle(ours_BTD: jax.Array, theirs_BTD: jax.Array, counted_BT: jax.Array) -> jax.Array:
    """Sum over the counted tokens of 1 - cosine."""
    length = lambda x: jnp.sqrt(jnp.sum(x * x, axis=-1) + 1e-12)
    cosine = jnp.sum(ours_BTD * theirs_BTD, axis=-1) / (length(ours_BTD) * length(theirs_BTD))
    return jnp.sum(jnp.where(counted_BT, 1 - cosine, 0))
