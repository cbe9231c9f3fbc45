"""What the Hopper kernels of every op need: a jax that has what they are written in, and a Hopper GPU."""

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.agreement import disagreement
from pallas_kernels.dispatch import Device

OLDEST = (0, 11, 2)
# On a GPU, as they are. Mosaic GPU changes between releases: on others a backend's results are tested once a
# process (`self_test`).
TESTED = ("0.11.2", "0.12.0.1")


def why_not(version: str, python: tuple[int, ...]) -> str | None:
    """None if the kernels can be imported with this jax, else what to install."""
    if tuple(map(int, re.findall(r"\d+", version)[:3])) >= OLDEST:
        return None
    oldest = ".".join(map(str, OLDEST))
    first = "" if python >= (3, 12) else "Python >= 3.12 and "
    return (
        f"jax is {version} on Python {python[0]}.{python[1]}; for kernels install {first}"
        f"jax[cuda12] >= {oldest} (tested: {', '.join(TESTED)})"
    )


def runs_on(device: Device) -> str | None:
    """None if the kernels run on ``device``, else the reason why not."""
    if device.capability != "9.0":
        return f"compute capability {device.capability or 'unknown'} (Hopper, 9.0, only)"
    return None


def self_test(name: str, results: Callable[[], Mapping[str, tuple[Any, Any]]]) -> str | None:
    """Why a jax that was not tested on a GPU is wrong, if so, and None where it was.

    results: makes (the kernels', the reference's) results by name. That it passed is logged.
    """
    if jax.__version__ in TESTED:
        return None
    return disagreement(name, f"jax {jax.__version__} (tested: {', '.join(TESTED)})", results)


if reason := why_not(jax.__version__, sys.version_info[:2]):
    raise ImportError(reason)
