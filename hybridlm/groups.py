"""Parameters by patterns of their names: `optimizer.groups`, as factors of an update; `optimizer.freeze`.

Where layers of a stack have factors of their own, these are an array over it: the plan stays as it is.
"""

import difflib
from fnmatch import fnmatchcase

import numpy as np

from hybridlm import config as configs
from hybridlm import model, mup, schema, stack, stages
from hybridlm.config import Config
from hybridlm.errors import ConfigError
from hybridlm.optimizer import Factors, group

NEAREST = 3  # names in an error


def check(config: Config) -> None:
    """ConfigError for patterns, of any stage, that name no parameter or leave nothing to train.

    Of what is to be trained: where a run is read, an earlier release may have taken them.
    """
    for _, one in stages.split(config, configs.resolve):
        definition = model.build(one)
        factors(definition, one.optimizer)
        if definition.frozen:
            _check_frozen(definition)


def _check_frozen(definition: model.Definition) -> None:
    frozen, tied = definition.frozen, definition.model.tie_embeddings
    names = list(model.canonical_shapes(definition))
    if tied and model.froze("embedding", frozen):
        names.append("head")  # it is the embedding
    for at, one in enumerate(frozen):
        wanted = one.removeprefix("!")
        named = [name for name in names if fnmatchcase(name, wanted)]
        if not named:
            fix = "Names are layers.3.mixer.q_proj.kernel, embedding, head ...; * stands for anything."
            if tied and fnmatchcase("head", wanted):
                fix = "With model.tie_embeddings the head is the embedding."
            raise ConfigError("optimizer.freeze", wanted, "is the name of no parameter", fix)
        if one.startswith("!") and not any(model.froze(name, frozen[:at]) for name in named):
            fix = f"All but these: '*, {one}'."
            raise ConfigError("optimizer.freeze", one, "takes out what nothing before it freezes", fix)
    if not any(meta.trained for meta in model.metadata(definition).values()):
        raise ConfigError("optimizer.freeze", frozen, "leaves nothing to train")


def factors(definition: model.Definition, config: schema.Optimizer) -> Factors:
    """Factors of (learning rate, weight decay), float32 over the leading axes, by the names of `model.init`.

    Only of parameters that have others than 1. ConfigError for a pattern that none is called by.
    """
    given = widths(definition, config)
    base = dict(given)
    for pattern, rate, decay in config.multipliers():
        found = [name for name in given if fnmatchcase(name, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, given, NEAREST, cutoff=0) or list(given)[:NEAREST]
            fix = f"The nearest are {', '.join(near)}."
            raise ConfigError("optimizer.groups", pattern, "matches no parameter that is trained", fix)
        given |= {name: (base[name][0] * rate, base[name][1] * decay) for name in found}
    return stacked(definition, given)


def widths(definition: model.Definition, config: schema.Optimizer) -> dict[str, tuple[float, float]]:
    """muP's factors by canonical names; 1 and 1 without it."""
    growth = mup.growth(definition.model)
    found: dict[str, tuple[float, float]] = {}
    for name, meta in model.metadata(definition).items():
        if meta.trained:
            muon = config.name == "muon" and group(meta) == "muon"
            named = stack.unstack(definition.layout, {name: None}, lambda leaf, place: None)
            found |= dict.fromkeys(named, mup.factors(meta, growth, muon))
    return found


def stacked(definition: model.Definition, given: dict[str, tuple[float, float]]) -> Factors:
    """Of ``given`` by canonical names, those that are not (1, 1)."""
    result = {}
    for name, shape in model.shapes(definition).items():
        one = stack.unstack(definition.layout, {name: np.zeros(shape.shape[: stack.leading(name)])})
        if not any(given.get(canonical, (1.0, 1.0)) != (1.0, 1.0) for canonical in one):
            continue
        ones = [given[canonical] for canonical in one]
        if len(set(ones)) == 1:
            result[name] = ones[0]
            continue
        axes = (*shape.shape[:2], *(1 for _ in shape.shape[2:]))
        table = stack.restack(definition.layout, dict(zip(one, np.array(ones), strict=True)), [name])[name]
        rate, decay = np.moveaxis(np.asarray(table, np.float32), -1, 0)
        result[name] = rate.reshape(axes), decay.reshape(axes)
    return result
