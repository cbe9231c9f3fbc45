"""Parameters of a teacher that the student has too, which lie in memory once: in the student's state.

A parameter that came from the teacher as it is, and that no stage so far has trained, is the teacher's still.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybridlm import init_from, model, stack

if TYPE_CHECKING:
    from hybridlm.config import Config


def names(parts: Sequence["Config"]) -> frozenset[str]:
    """Canonical names of what the teacher of the last of ``parts`` can be lent by the student.

    parts: the configs of a run's stages up to one (`stages.split`), or of a run without stages alone.
    """
    teacher, source = str(getattr(parts[-1].objective, "teacher", "")), parts[-1].init_from
    if not teacher or not source or init_from.split(teacher) != init_from.split(source):
        return frozenset()
    theirs, ours = model.build(init_from.described(teacher, "objective.teacher")), model.build(parts[-1])
    there, here = model.canonical_shapes(theirs), model.canonical_shapes(ours)
    found = {
        name
        for name in init_from.alike(here, ours, there, theirs)
        if not name.startswith("shared.") and _unmapped(name, ours, theirs)
    }
    for part in parts:
        found &= _frozen(model.build(part))
    return frozenset(found)


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
