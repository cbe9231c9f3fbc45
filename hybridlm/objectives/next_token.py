"""Next-token prediction: cross-entropy, z-loss, and the layers' auxiliary losses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hybridlm import loss, objectives
from hybridlm import model as lm
from hybridlm.fields import NonNegative
from hybridlm.objectives import Batch, Sums
from hybridlm.rows import Rows

AUXILIARY = "loss."  # records of layers that join the loss


@dataclasses.dataclass(frozen=True)
class Config(objectives.Config):
    """z_loss: weight of log(Z)^2 per token (PaLM, section 5)."""

    z_loss: NonNegative = 0.0


class Objective(objectives.Objective):
    """sums: "loss_sum", "z_loss_sum", "tokens", "correct", "bytes" with token_bytes, and "<name>_loss_sum"
    for every "loss.<name>" that layers record: its mean over those layers, times the tokens."""

    config_class = Config
    config: Config

    def loss(
        self, params: lm.Params, frozen: lm.Params, batch: Batch, wanted: tuple[str, ...] = ()
    ) -> tuple[jax.Array, Sums]:
        model, z_loss = lm.merge(self.definition, params | frozen), self.config.z_loss
        rows = Rows(batch["segment_ids"], batch["positions"])
        hidden, records = model.forward(batch["tokens"], rows, (AUXILIARY + "*", *wanted))
        head, said = model.head_matrix(), self.definition.model
        how: dict[str, Any] = {"z_loss": z_loss, "tall": said.tie_embeddings, "cap": said.logit_cap}
        total, found = loss.cross_entropy(hidden, head, batch["targets"], **how)
        sums: Sums = {"loss_sum": found.cross_entropy, "z_loss_sum": z_loss * found.log_z_squared}
        sums |= {"tokens": found.tokens, "correct": found.correct}
        total, more = joined(total, found.tokens, records, batch["targets"], self.token_bytes)
        sums |= more
        if wanted:
            sums["records"] = {name: value for name, value in records.items() if f".{AUXILIARY}" not in name}
        return total, sums


def joined(
    total: jax.Array,
    tokens: jax.Array,
    records: dict[str, jax.Array],
    targets: jax.Array,
    token_bytes: jax.Array | None,
) -> tuple[jax.Array, Sums]:
    """(``total`` and the layers' auxiliary losses, these by name and "bytes" with ``token_bytes``)."""
    sums: Sums = {}
    if token_bytes is not None:
        counted = jnp.where(targets >= 0, token_bytes[targets], 0)
        sums["bytes"] = jnp.sum(counted.astype(jnp.float32))
    auxiliary: dict[str, list[jax.Array]] = {}
    for canonical, value in records.items():
        name = canonical.split(".", 2)[2]  # layers.<index>.<name>
        if name.startswith(AUXILIARY):
            auxiliary.setdefault(name.removeprefix(AUXILIARY), []).append(value)
    for name, values in auxiliary.items():
        sums[f"{name}_loss_sum"] = jnp.mean(jnp.stack(values)) * tokens
        total += sums[f"{name}_loss_sum"]
    return total, sums
