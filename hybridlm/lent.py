"""Parameters of a teacher that the student has too, which lie in memory once: in the student's state.

A parameter that came from the teacher as it is, and that no stage so far has trained, is the teacher's still.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from hybridlm import init_from, model, stack
from hybridlm.errors import ConfigError

if TYPE_CHECKING:
    from hybridlm.config import Config

FIELD = "objective.teacher"


def names(parts: Sequence["Config"]) -> frozenset[str]:
    """Canonical names of what the teacher of the last of ``parts`` can be lent by the student.

    parts: the configs of a run's stages up to one (`stages.split`), or of a run without stages alone.
    """
    teacher, source = str(getattr(parts[-1].objective, "teacher", "")), parts[-1].init_from
    if not teacher or not source or init_from.split(teacher) != init_from.split(source):
        return frozenset()
    theirs, ours = model.build(init_from.described(teacher, FIELD)), model.build(parts[-1])
    there, here = model.canonical_shapes(theirs), model.canonical_shapes(ours)
    found = {
        name
        for name in init_from.alike(here, ours, there, theirs)
        if not name.startswith("shared.") and _unmapped(name, ours, theirs)
    }
    for part in parts:
        found &= _frozen(model.build(part))
    return frozenset(found)


def check(lent: frozenset[str], teacher: str, definition: model.Definition, params: model.Params) -> None:
    """ConfigError if ``params``, of a run that goes on, are not the teacher's in what they lend it: it began
    with those of another."""
    if not lent:
        return
    metadata = model.metadata(definition)
    with init_from.source(teacher, FIELD) as other:
        for stacked in (name for name in params if metadata[name].frozen):
            for name, ours in model.unstack(definition, {stacked: params[stacked]}).items():
                value = other.read(name) if name in lent else None
                if value is None:
                    continue
                theirs = jax.make_array_from_callback(value.shape, ours.sharding, value.__getitem__)
                if not jnp.array_equal(ours, theirs):
                    problem = f"has other values of {name!r} than this run, which never trained it"
                    fix = "Bring back the init_from and the teacher that the run began with."
                    raise ConfigError(FIELD, teacher, problem, fix)


def _unmapped(name: str, ours: model.Definition, theirs: model.Definition) -> bool:
    """Whether `mapping` leaves the parameter to be what it was."""
    if ".mixer." not in name:
        return True
    layer = int(name.split(".")[1])
    return ours.layers[layer].config == theirs.layers[layer].config


def _frozen(definition: model.Definition) -> set[str]:
    """Canonical names of what is not trained and no rule changes."""
    metadata, shapes = model.metadata(definition), model.shapes(definition)
    still = {name: leaf for name, leaf in shapes.items() if metadata[name].frozen}
    return set(stack.shapes_apart(definition.layout, still))
