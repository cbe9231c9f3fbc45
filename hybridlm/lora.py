"""Low-rank factors beside matrices (LoRA: Hu et al. 2021, arXiv 2106.09685): ``model.lora``.

    y = x W + (alpha / r) (x A) B       A [in, r] ~ U(-in^-1/2, in^-1/2), B [r, out] = 0 at first

W has no gradient and no optimiser state. The factors are parameters like any other, "<matrix>.lora_a" and
"<matrix>.lora_b": they are stacked, sharded, frozen and saved as such. Export, a teacher and `init_from` see
W + (alpha / r) A B and no factors. (`flax.nnx.LoRA` has no alpha, and qwix makes its factors while a call is
traced, which a scan over layers does not allow.)
"""

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridlm import qk_clip, schema
from hybridlm.block import Factors, Spec, abstract, matrices
from hybridlm.errors import ConfigError
from hybridlm.layers import LORA

if TYPE_CHECKING:
    from hybridlm.config import Config
    from hybridlm.model import Definition

FIELD = "model.lora"


def parsed(given: tuple[str, ...]) -> list[Factors]:
    """Of each "PATTERN=RANK" or "PATTERN=RANK/ALPHA"; called by the pattern."""
    found = []
    for text in given:
        match = re.fullmatch(rf"([^=]+)=([1-9][0-9]{{0,5}})(?:/({schema.FACTOR}))?", text.replace(" ", ""))
        if not match:
            fix = "For example layers.*.mixer.[qkvo]_proj.kernel=8/16."
            raise ConfigError(FIELD, text, "must be PATTERN=RANK or PATTERN=RANK/ALPHA", fix)
        rank = int(match[2])
        found.append(Factors(match[1], rank, float(match[3] or rank) / rank))
    return found


def placed(config: "Config", layers: tuple[Spec, ...]) -> tuple[Spec, ...]:
    """``layers`` with the factors that the config gives their matrices, which are then frozen."""
    wanted = parsed(config.model.lora)
    if not wanted:
        return layers
    named = {spec: list(matrices(abstract(config.model, spec))) for spec in dict.fromkeys(layers)}
    matched, result = set(), []
    for index, spec in enumerate(layers):
        factors = []
        for name in named[spec]:
            hits = [one for one in wanted if fnmatchcase(f"layers.{index}.{name}.kernel", one.name)]
            matched |= {one.name for one in hits}
            factors += [one._replace(name=name) for one in hits[-1:]]
        frozen = tuple(f"{one.name}.kernel" for one in factors)
        result.append(spec._replace(lora=tuple(factors), frozen=frozen))
    for pattern, _, _ in wanted:
        if pattern not in matched:
            fix = "Names are layers.3.mixer.q_proj.kernel, layers.0.mlp.up.kernel ...; * stands for anything."
            raise ConfigError(FIELD, pattern, "is the name of no matrix in a layer that can have some", fix)
    clipped = [spec for spec in result if spec.lora and qk_clip.clips(spec, config.model.d_model)]
    if config.optimizer.qk_clip and clipped:
        raise ConfigError(FIELD, config.model.lora, "cannot be trained with optimizer.qk_clip")
    return tuple(result)


class Merged(Mapping[str, Any]):
    """Parameters by canonical name without factors: each matrix with its factors in it, made when asked for.

    definition: of the model with factors.  arrays: its parameters, anything that NumPy can read.
    """

    def __init__(self, definition: "Definition", arrays: Mapping[str, Any]):
        self.arrays = arrays
        self.factors = {
            f"layers.{index}.{one.name}.kernel": one
            for index, spec in enumerate(definition.layers)
            for one in spec.lora
        }

    def __getitem__(self, name: str) -> Any:
        if name.endswith(LORA):
            raise KeyError(name)
        factors = self.factors.get(name)
        if factors is None:
            return self.arrays[name]
        W, A, B = (np.asarray(self.arrays[name.removesuffix("kernel") + part]) for part in ("kernel", *LORA))
        return W + np.float32(factors.scale) * (A @ B)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.arrays if not name.endswith(LORA))

    def __len__(self) -> int:
        return len(self.arrays) - len(LORA) * len(self.factors)
