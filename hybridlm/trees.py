"""Nested trees as flat dicts of dotted names, and back."""

from collections.abc import Callable, Mapping
from typing import Any

import jax


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Leaves by dotted path: {"0.mu.embedding": array, ...}; a bare leaf is named "value"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator=".") or "value": leaf for path, leaf in leaves}


def unflatten(like: Any, flat: Mapping[str, Any]) -> Any:
    """The tree shaped as ``like`` whose leaves are looked up in ``flat``."""
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in flatten(like)])
