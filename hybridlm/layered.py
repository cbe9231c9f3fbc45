"""The parameters of a model layer by layer, whatever runs and stacks its plan made of them.

Canonical names: "layers.<index>.<path in the block>" for a layer's parameter
("layers.3.mixer.q_proj.kernel"), and the dotted path in the tree for the others ("embedding",
"final_norm.scale", "shared.hgrn2.lower_bounds").
"""

from typing import NamedTuple

from hybridlm import model
from hybridlm.run.checkpoint import flatten


class Entry(NamedTuple):
    """Where a canonical parameter is: ``leaf[place]`` of the leaf at the dotted ``path``; () is all."""

    path: str
    place: tuple[int, ...]
    shape: tuple[int, ...]


def entries(definition: model.Definition) -> dict[str, Entry]:
    """Canonical name -> Entry, layers in order."""
    blocks: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    found = {}
    for path, leaf in flatten(model.shapes(definition)).items():
        top, *rest = path.split(".", 3)
        if top == "segments":
            segment, run, name = rest
            blocks.setdefault((segment, run), {})[name] = leaf.shape
        else:
            found[path] = Entry(path, (), leaf.shape)
    for index, place in enumerate(definition.plan.places()):
        segment, run = str(place.segment), str(place.run)
        for name, shape in blocks[segment, run].items():
            path = f"segments.{segment}.{run}.{name}"
            found[f"layers.{index}.{name}"] = Entry(path, (place.repeat, place.offset), shape[2:])
    return found
