"""A run's parameters in float32 and its logits: what implementations are compared by."""

import errno
import functools
import io
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import model, untrusted, weights
from hybridlm.convert.incoming import writing
from hybridlm.errors import ConfigError
from hybridlm.rows import single_document


def load(
    workdir: str | Path, step: int | None = None, ema: bool = False
) -> tuple[model.Definition, model.Params]:
    """(definition that computes in float32, parameters of the newest checkpoint or of that at ``step``).

    ema: the average of the weights in place of them.
    """
    loaded = weights.load(workdir, step, ema, model__dtype="float32", model__remat="none")
    return loaded.definition, loaded.params


@functools.partial(jax.jit, static_argnums=0)
def _logits(definition: model.Definition, params: model.Params, tokens_BT: jax.Array) -> jax.Array:
    return model.logits(definition, params, tokens_BT, single_document(*tokens_BT.shape))


def logits(definition: model.Definition, params: model.Params, ids_BT: Any) -> np.ndarray:
    """Float32 [B, T, V], each row one document, matrix products in full float32."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(_logits(definition, params, jnp.asarray(ids_BT, jnp.int32)))


def save_logits(workdir: Path, ids: Path, out: Path, step: int | None = None, ema: bool = False) -> None:
    with writing("--out", out):  # tried before minutes of computing; what is there stays until then
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        probe = out.with_name(f".{out.name}.probe")
        untrusted.write_bytes(probe, b"")
        probe.unlink()
    try:
        tokens = np.load(ids)
    except (OSError, ValueError) as error:
        raise ConfigError("--ids", str(ids), f"is no readable .npy file ({error})") from None
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise ConfigError("--ids", f"{tokens.dtype}{list(tokens.shape)}", "must be whole numbers [B, T]")
    definition, params = load(workdir, step, ema)
    if tokens.min() < 0 or tokens.max() >= definition.vocab_size:
        span = f"{tokens.min()} to {tokens.max()}"
        raise ConfigError("--ids", span, f"must be token ids 0 to {definition.vocab_size - 1}")
    whole = io.BytesIO()
    np.save(whole, logits(definition, params, tokens))
    with writing("--out", out):
        untrusted.write_bytes(out, whole.getvalue())
