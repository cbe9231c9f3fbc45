"""Whether kernels that were not tested on this device or with this jax are right: beside a reference."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import here, logger

# A relative error of results in bf16, and of their gradients: kernels have half, wrong ones have 1.
TOLERANCE = 2e-2


def self_test(name: str, results: Callable[[], Mapping[str, tuple[Any, Any]]]) -> str | None:
    """`disagreement` of kernels that are asked on every GPU, with every jax."""
    return disagreement(name, f"compute capability {here().capability} with jax {jax.__version__}", results)


def disagreement(name: str, where: str, results: Callable[[], Mapping[str, tuple[Any, Any]]]) -> str | None:
    """Why an op's results are wrong ``where`` it was not tested, or None; that they are right is logged.

    results: makes (the kernels', the reference's) results by name.
    """
    try:
        errors = {what: _relative_error(got, want) for what, (got, want) in results().items()}
    except Exception as error:
        return f"{where}, and its self-test failed: {type(error).__name__}: {str(error)[:300]}"
    wrong = {what: f"{error:.1e}" for what, error in errors.items() if not error < TOLERANCE}
    if wrong:
        return f"{where}, and its self-test gave wrong results: {wrong}"
    worst = max(errors.values())
    logger.info("%s: self-test passed on %s; largest relative error %.1e", name, where, worst)
    return None


def _relative_error(got: jax.Array, want: jax.Array) -> float:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
