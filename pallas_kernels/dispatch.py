"""Who computes a call, chosen while tracing: the Hopper kernels where they support it, else XLA, said once.

Fails closed: kernels that cannot be imported, or that refuse a call, are not used.
"""

import contextlib
import contextvars
import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from types import ModuleType

import jax

from pallas_kernels.linear_attention.call import platform

BACKENDS = ("auto", "reference", "xla", "pallas")
logger = logging.getLogger("pallas_kernels")
_auto: contextvars.ContextVar[str] = contextvars.ContextVar("auto", default="auto")


@contextlib.contextmanager
def auto_means(backend: str) -> Iterator[None]:
    """Calls with backend="auto" traced inside use ``backend``, to compare backends under a whole model."""
    _check(backend)
    token = _auto.set(backend)
    try:
        yield
    finally:
        _auto.reset(token)


def meaning(backend: str = "auto") -> str:
    """``backend``, checked; for "auto" what `auto_means` says, "auto" outside of it."""
    _check(backend)
    return _auto.get() if backend == "auto" else backend


def kernels(
    module: str,
    caller: str,
    supports: Callable[[ModuleType], str | None],
    *,
    interpret: bool = False,
    required: str = "",
) -> ModuleType | None:
    """``module`` of this package if it is to compute a call of ``caller``; else None, logged once per reason.

    supports: asks the module: None if it computes the call, else the reason why not.
    interpret: off the GPU too.  required: the argument that rules out anything else, as the user gave it.

    Raises:
        ValueError: ``required``, and the module does not compute the call; with the reason.
    """
    where = platform()
    reason: str | None = f"the platform is {where}"
    if where == "gpu" or interpret or required:
        try:
            found = importlib.import_module(f"pallas_kernels.{module}")
        except Exception as error:  # an unsuitable jax fails in many ways; each only means: no kernels here
            reason = f"pallas_kernels.linear_attention.hopper cannot be imported with jax {jax.__version__} ({error})"
        else:
            reason = supports(found)
            if reason is None:
                return found
    if required:
        raise ValueError(f"{required}: the kernels do not support this call: {reason}")
    log_once(caller, reason, logging.WARNING if where == "gpu" else logging.INFO)
    return None


def _check(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}: must be one of {', '.join(BACKENDS)}")


@functools.cache
def log_once(caller: str, reason: str, level: int) -> None:
    logger.log(level, "%s runs on XLA instead of the Pallas kernels: %s", caller, reason)
