"""What follows the mixer in a block, one file a kind: `hybridlm/mlps/<kind>.py` defines Config, Mlp and idle.

    Config: frozen dataclass of settings, each with a default; `check(d_model)` refuses impossible ones.
    Mlp(config, d_model, rngs=rngs): `(x [..., D], rows) -> (y [..., D], balance)`. balance is None, or the
        load-balancing loss of this call (float32 scalar), a mean over the tokens that are not padding.
    idle(config, d_model): parameters of one layer that a given token does not touch.

Adding a file adds a kind.
"""

import importlib
import pkgutil
from types import ModuleType

from hybridlm.errors import ConfigError, nearest


def kinds() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(kind: str) -> ModuleType:
    """The module of ``kind``; ConfigError for a kind that has no file."""
    if kind not in kinds():
        raise ConfigError("kind", kind, "must be one of " + ", ".join(kinds()), nearest(kind, kinds()))
    return importlib.import_module(f"hybridlm.mlps.{kind}")
