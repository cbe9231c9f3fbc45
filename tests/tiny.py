"""The smallest run that has everything: a linear and a full layer, text, validation, samples, checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hybridlm import config as configs
from hybridlm.objectives import next_token
from hybridlm.run import logbook

TIMES = ("tokens_per_second", "step_seconds", "data_seconds", "compute_seconds", "mfu", "hfu")


def write_text(folder: Path) -> str:
    """Files of words in a random order; returns the glob that finds them."""
    rng = np.random.default_rng(0)
    words = ["state", "gate", "decay", "chunk", "head", "value", "key", "query"]
    for index in range(8):
        (folder / f"{index}.txt").write_text(" ".join(rng.choice(words, size=200)))
    return f"{folder}/*.txt"


def config(text: str, **fields: Any) -> ConfigDict:
    """Unresolved; ``fields`` are overrides with dots as double underscores."""
    c = configs.default()
    c.model.update(pattern="retnet full", d_model=16, vocab_size=260, mlp_hidden=32)
    c.model.update(dtype="float32", remat="none")
    sizes = {"num_heads": 4, "head_dim": 8}
    c.mixers = {"retnet": configs.mixer("retnet", **sizes), "full": configs.mixer("attention", **sizes)}
    c.data = configs.data("text", path=text, holdout=0.3)
    c.train.update(steps=6, batch_size=8, seq_len=16)
    c.optimizer.update(learning_rate=0.01, warmup_steps=2)
    c.checkpoint.every_steps = 0
    c.eval.update(every_steps=0, batches=2)
    c.log.every_steps = 1
    for name, value in fields.items():
        section, field = name.split("__", 1)
        c[section][field] = value
    return c


def lines(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    records = logbook.read(workdir / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def loss_fn(definition, params, batch, z_loss: float = 0.0, token_bytes=None):
    """(sum to differentiate, sums) of next-token prediction."""
    config = next_token.Config(kind="next_token", z_loss=z_loss)
    return next_token.Objective(config, definition, token_bytes).loss(params, {}, batch)
