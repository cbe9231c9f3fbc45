"""The parameters of a run, as its checkpoints have them, and the tokenizer that belongs to them."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybridlm import config as configs
from hybridlm import model, untrusted
from hybridlm.config import Config
from hybridlm.data import tokenizer as tokenizers
from hybridlm.data.tokenizer import FileTokenizer, Tokenizer
from hybridlm.errors import ConfigError
from hybridlm.run import checkpoint, private

log = logging.getLogger("hybridlm")

TOKENIZER = "tokenizer.json"  # in a workdir
CARRIED = "hf"  # what a workdir keeps of the public checkpoint that it came from


class Weights(NamedTuple):
    """A run's model at ``step``."""

    config: Config
    definition: model.Definition
    params: model.Params
    step: int


def load(workdir: str | Path, step: int | None = None, ema: bool = False, **changes: str) -> Weights:
    """The run in ``workdir`` at ``step`` (None: its newest checkpoint), on one device, or whole on each of
    the mesh in context.

    ema: the average of its weights in place of them.
    changes: to the config, such as model__dtype="float32". ConfigError where there is no such checkpoint.
    """
    workdir = Path(workdir).absolute()
    config = configs.of_run(workdir).replace(**changes)
    definition = model.build(config)
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError("--workdir", str(workdir), "holds no checkpoints", "Train the run first.")
    with checkpoint.Checkpoints(workdir / "checkpoints") as saves:
        step = saves.chosen(step)
        mesh = jax.sharding.get_mesh()
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        where = one if mesh.empty else jax.NamedSharding(mesh, jax.P())
        place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        like = jax.tree.map(place, model.canonical_shapes(definition))
        flat = saves.restore(step, {"params": like})["params"]
        if ema:
            average = {name: like[name] for name in averaged(config, definition)}
            flat |= saves.restore(step, {"ema": average})["ema"]
    finite = lambda flat: {name: jnp.isfinite(leaf).all() for name, leaf in flat.items()}
    params, found = jax.jit(lambda flat: (model.restack(definition, flat), finite(flat)))(flat)
    if lost := [name for name, yes in found.items() if not yes]:
        said = "%s at step %d: %d of %d parameters are not finite, %s among them: nothing follows from them"
        log.warning(said, private.hide(str(workdir)), step, len(lost), len(flat), lost[0])
    return Weights(config, definition, params, step)


def averaged(
    config: Config, definition: model.Definition, field: str = "--ema", value: Any = True
) -> list[str]:
    """The names of the parameters that the run of ``config`` keeps an average of; ConfigError, of the
    ``field`` that asked with ``value``, if of none."""
    if not config.optimizer.ema:
        raise ConfigError(field, value, "the run kept no average of its weights", "Train with optimizer.ema.")
    return list(model.trained_shapes(definition))


def tokenizer(workdir: str | Path, config: Config) -> Tokenizer | None:
    """The tokenizer of the run in ``workdir``; None if its tokens stand for no text.

    The one that lies beside the weights, or that of the folder that the run was imported from (what is
    trained from an import has data of its own), or else what the run's data name, read without their text.
    ConfigError where neither can be read, and for one with ids that the model has not.
    """
    places = [Path(workdir) / TOKENIZER, *([] if config.init_from else [Path(workdir) / CARRIED / TOKENIZER])]
    own = next((place for place in places if place.is_file()), None)
    found = tokenizers.load(str(own)) if own else config.data.load_tokenizer()
    if found is not None:
        check_fits(found, config.model.vocab_size)
        found.more_ends = ends(Path(workdir), found)
    return found


def ends(workdir: Path, used: Tokenizer) -> tuple[int, ...]:
    """Ids after which the model that ``workdir`` was imported from ends a text; () where they are of another
    tokenizer than ``used``. Where the import brought no tokenizer file, those special in ``used``."""
    folder = workdir / CARRIED
    theirs = folder / TOKENIZER
    if not isinstance(used, FileTokenizer) or (theirs.is_file() and theirs.read_bytes() != used.content):
        return ()
    found = [read(folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
    token = read(folder / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
        found.append(used.file.token_to_id(token))
    ids = [i for one in found for i in (one if isinstance(one, list) else [one]) if isinstance(i, int)]
    added = used.file.get_added_tokens_decoder()
    known = range(used.vocab_size) if theirs.is_file() else [i for i, one in added.items() if one.special]
    return tuple(sorted({i for i in ids if i in known}))


def read(file: Path) -> dict[str, Any]:
    """A JSON object that an import brought; {} where there is none."""
    return untrusted.read_json(file, "--workdir", dict) if file.is_file() else {}


def keep_tokenizer(workdir: Path, used: Tokenizer | None) -> None:
    """Puts the tokenizer of a run beside its weights, so that they can be read without its data."""
    if isinstance(used, FileTokenizer):
        untrusted.write_bytes(workdir / TOKENIZER, used.content)
    else:  # of an earlier start that left no checkpoint
        (workdir / TOKENIZER).unlink(missing_ok=True)


def check_fits(found: Tokenizer, vocab_size: int) -> None:
    if found.vocab_size > vocab_size:
        raise ConfigError("--tokenizer", found.name, f"has {found.vocab_size} ids, the model {vocab_size}")
