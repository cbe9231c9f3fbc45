"""Data kind "pathfinder": whether two discs are the ends of one dashed curve, pixel by pixel.

Linsley et al. 2018 (arXiv 1805.08315), as in Long Range Arena (arXiv 2011.04006): two long curves of dashes
and some short ones to distract; two discs mark both ends of one long curve (class 1) or an end of each
(class 0). Sizes are those of LRA's hard set of 32 x 32 pixels: 14 dashes of length 2 and thickness 1/2, a
pixel apart, 5 distractors of 4. The published generator needs functions that SciPy no longer has; this one
is written anew (dashes turn by up to `TURN` and keep `APART` from other curves), so images are alike, not
equal.

A row is the pixels from the top left, 256 levels of grey, then a mark, at which the class is the target.
"""

import dataclasses
import math
import random
from typing import Annotated

import numpy as np

from hybridlm.data import generated
from hybridlm.data.generated import BLOCK, Examples, Generated, classified, need
from hybridlm.data.source import View
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Limits

MARK, CLASSES = 256, 257  # the first class
VOCABULARY = CLASSES + 2
DASH, STEP, THICKNESS = 2.0, 3.0, 0.5  # pixels; STEP from centre to centre
TURN, APART, DISC = 0.8, 3.1, 1.5  # radians; pixels; radius in pixels
SHARP = 1.6  # levels of grey fall to 0 within 1 / SHARP pixels of an edge
EDGE, BACK = 1.5, 4  # pixels to the border; dashes that are taken back where a curve is stuck
ROOM = 0.35  # share of the field that the two long curves may take
SHORT = 4  # dashes of a distractor
TRIES = 12
Dash = tuple[float, float, float]  # centre in pixels, angle


@dataclasses.dataclass(frozen=True)
class Config(generated.Config):
    """size: pixels of a side; 32 in LRA, 128 in Path-X.
    dashes: of a long curve.
    distractors: short curves, fewer where no room is left.
    """

    size: Annotated[int, Limits(12, 256)] = 32
    dashes: Annotated[int, Limits(2, 200)] = 14
    distractors: Count = 5

    def check(self) -> None:
        most = int((self.size - 2 * EDGE) ** 2 * ROOM / (2 * STEP * APART))
        if self.dashes > most:
            allowed = f"must be at most {most}, so that two such curves fit into {self.size} x {self.size}"
            raise ConfigError("dashes", self.dashes, allowed, "Draw shorter ones, or on a larger field.")

    def open(self, view: View) -> Generated:
        need(view, "kind", "pathfinder", vocab_size=VOCABULARY)
        need(view, "size", self.size, seq_len=length(self.size))

        def make(rng: np.random.Generator) -> Examples:
            chance = random.Random(int(rng.integers(2**63)))
            made = [draw(chance, self, label) for label in rng.integers(2, size=BLOCK).tolist()]
            return classified(made, length(self.size), mark=MARK, pad=0, first=CLASSES)

        sizes = (self.size, self.dashes, self.distractors)
        name, entropy = f"pathfinder {sizes}", (12, *sizes)
        return Generated(make, view, self, name=name, length=length(self.size), entropy=entropy)


def length(size: int) -> int:
    """Tokens of an example."""
    return size * size + 1


def draw(rng: random.Random, config: Config, label: int) -> tuple[np.ndarray, int]:
    """(grey levels [size * size] of an image of the class, the class)."""
    while (curves := _curves(rng, config)) is None:
        pass
    first, second = curves[:2]
    end = first[-1] if label else second[rng.choice((0, -1))]
    marks = np.array([first[0], end])[:, :2]
    return _pixels(np.concatenate(curves), marks, config.size).reshape(-1), label


class Field:
    """Where dashes are, as counts on a grid of half pixels."""

    def __init__(self, size: int):
        self.size, self.pad = size, int(2 * APART) + 1
        self.near = np.zeros((2 * (size + self.pad),) * 2, np.int16)
        reach = np.arange(-self.pad, self.pad + 1)
        self.disc = (np.hypot(*np.meshgrid(reach, reach)) < 2 * APART).astype(np.int16)

    def add(self, dash: Dash, count: int = 1) -> None:
        x, y = round(2 * dash[0]), round(2 * dash[1])
        self.near[x : x + 2 * self.pad + 1, y : y + 2 * self.pad + 1] += count * self.disc

    def free(self, dash: Dash) -> bool:
        x, y = dash[:2]
        inside = EDGE <= x <= self.size - EDGE and EDGE <= y <= self.size - EDGE
        return inside and not self.near[round(2 * x) + self.pad, round(2 * y) + self.pad]


def _curves(rng: random.Random, config: Config) -> list[list[Dash]] | None:
    """Curves of dashes, the two long ones first; None where one of those finds no room."""
    field, curves = Field(config.size), []
    for index, dashes in enumerate([config.dashes] * 2 + [SHORT] * config.distractors):
        curve = _curve(rng, dashes, field)
        if curve is not None:
            curves.append(curve)
        elif index < 2:
            return None
    return curves


def _curve(rng: random.Random, dashes: int, field: Field) -> list[Dash] | None:
    """A curve that keeps away from others and from itself, now in ``field``; None, not there, if stuck.

    The newest dash is not in the field yet, since the next one is nearer to it than `APART` allows.
    """
    found: list[Dash] = []
    for _ in range(TRIES * dashes):
        if len(found) == dashes:
            field.add(found[-1])
            return found
        for dash in (_next(rng, found, field.size) for _ in range(TRIES)):
            if field.free(dash):
                if found:
                    field.add(found[-1])
                found.append(dash)
                break
        else:
            _take_back(found, field, BACK)
    _take_back(found, field, len(found))
    return None


def _next(rng: random.Random, found: list[Dash], size: int) -> Dash:
    if not found:
        return rng.uniform(EDGE, size - EDGE), rng.uniform(EDGE, size - EDGE), rng.uniform(0, 2 * math.pi)
    x, y, angle = found[-1]
    angle += rng.uniform(-TURN, TURN)
    return x + STEP * math.cos(angle), y + STEP * math.sin(angle), angle


def _take_back(found: list[Dash], field: Field, count: int) -> None:
    """Removes the last ``count`` dashes; the last that is left is not in the field again."""
    keep = max(0, len(found) - count)
    for dash in found[max(0, keep - 1) : -1]:
        field.add(dash, -1)
    del found[keep:]


def _pixels(dashes_N3: np.ndarray, marks: np.ndarray, size: int) -> np.ndarray:
    """[size, size] grey levels."""
    side = np.arange(size, dtype=np.float32) + np.float32(0.5)
    centre = np.stack(np.meshgrid(side, side, indexing="xy"), axis=-1)
    dashes_N3, marks = dashes_N3.astype(np.float32), marks.astype(np.float32)
    from_N = centre[None] - dashes_N3[:, None, None, :2]
    angle = dashes_N3[:, 2, None, None]
    along = from_N[..., 0] * np.cos(angle) + from_N[..., 1] * np.sin(angle)
    across = from_N[..., 1] * np.cos(angle) - from_N[..., 0] * np.sin(angle)
    beyond = np.maximum(np.abs(along) - DASH / 2, 0)
    ink = 1 - SHARP * (np.sqrt(beyond**2 + across**2) - THICKNESS / 2)
    disc = 1 - SHARP * (np.sqrt(np.square(centre[None] - marks[:, None, None]).sum(axis=-1)) - DISC)
    level = np.clip(np.concatenate([ink, disc]), 0, 1).max(axis=0)
    return np.rint(255 * level).astype(np.int32)
