"""Reading a public config.json: every field is understood, known not to matter, or refused by name."""

from collections.abc import Collection, Mapping
from typing import Any

from hybridlm import untrusted
from hybridlm.errors import ConfigError

MAX_LAYERS, MAX_SIZE = 10_000, 1 << 31  # above every model; a number beyond would take minutes to refuse

# Fields that say nothing about what a forward pass computes.
INERT = {
    "_attn_implementation", "_name_or_path", "add_cross_attention", "architectures",
    "attention_dropout", "attn_mode", "auto_map", "bad_words_ids", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "finetuning_task", "fuse_cross_entropy",
    "fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu", "id2label", "initializer_range",
    "is_decoder", "is_encoder_decoder", "label2id", "max_position_embeddings", "model_type",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
    "rescale_prenorm_residual", "return_dict", "sep_token_id", "task_specific_params",
    "tokenizer_class", "torch_dtype", "transformers_version", "use_cache", "use_l2warp",
    # of generation, which older transformers kept here
    "do_sample", "max_length", "num_beams", "repetition_penalty", "temperature", "top_k", "top_p",
}  # fmt: skip

YARN = (
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "factor", "original_max_position_embeddings",
    "truncate", "attention_factor",
)  # fmt: skip


class Fields:
    """A config.json whose fields are taken one by one; `finish` refuses what nobody took.

    source: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], source: str = "config.json"):
        self.values, self.source, self.taken = values, source, set(INERT)

    def refuse(self, name: str, allowed: str, fix: str = "") -> ConfigError:
        return ConfigError(f"{self.source}: {untrusted.terminal(name)}", self.values.get(name), allowed, fix)

    def get(self, name: str, default: Any = None) -> Any:
        """The value; ``default`` where it is missing or null. Numbers must be what the default is."""
        self.taken.add(name)
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(default, bool) and not isinstance(value, bool):
            raise self.refuse(name, "must be true or false")
        if isinstance(default, int) and not isinstance(default, bool):
            return self._whole(name, value)
        if isinstance(default, float):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self.refuse(name, "must be a number")
            if not abs(value) <= 1e300:
                raise self.refuse(name, "must be finite")
            return float(value)
        return value

    def size(self, name: str, most: int = MAX_SIZE, default: int | None = None) -> int:
        """A positive whole number; it must be there unless there is a ``default``."""
        value = self.get(name, default)
        if value is None:
            raise self.refuse(name, "is missing")
        if not 1 <= self._whole(name, value) <= most:
            raise self.refuse(name, f"must be from 1 to {most:,}")
        return value

    def table(self, names: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """By setting, of (field, what a missing one is[, the most it may be]): `public.told` writes them.

        Whole numbers are at least 1.
        """
        found = {}
        for ours, (name, default, *most) in names.items():
            if type(default) is int:
                found[ours] = self.size(name, most[0] if most else MAX_SIZE, default)
            else:
                found[ours] = self.get(name, default)
        return found

    def _whole(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(name, "must be a whole number")
        if not -MAX_SIZE <= value <= MAX_SIZE:
            raise self.refuse(name, f"must be at most {MAX_SIZE:,}")
        return value

    def part(self, name: str, width: float, heads: int) -> int:
        """Channels per head of a width that ``name`` decides, which must split evenly."""
        if heads < 1 or width < heads or width != int(width) or int(width) % heads:
            raise self.refuse(name, f"must split a width of {width:g} into {heads} heads evenly")
        return int(width) // heads

    def either(self, first: str, second: str, default: Any, most: int = MAX_SIZE) -> Any:
        """A field that goes by two names."""
        self.ignore(first, second)
        known = [name for name in (first, second) if self.values.get(name) is not None]
        values = [self.get(name, default) for name in known]
        if len(values) == 2 and values[0] != values[1]:
            raise self.refuse(first, f"contradicts {second} = {values[1]}")
        if values and not 0 <= values[0] <= most:
            raise self.refuse(known[0], f"must be from 0 to {most:,}")
        return values[0] if values else default

    def only(self, name: str, *supported: Any) -> None:
        """Refuses every value but the ``supported`` ones; a missing or null field stands for the first."""
        self.taken.add(name)
        value = self.values.get(name)
        if value is not None and value not in supported:
            listed = " or ".join(map(repr, supported))
            raise self.refuse(name, f"is not supported; only {listed} is")

    def ignore(self, *names: str) -> None:
        self.taken.update(names)

    def sub(self, name: str) -> "Fields | None":
        """A nested mapping, None where there is none; to be finished by itself."""
        self.taken.add(name)
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.refuse(name, "must be a mapping")
        return None if value is None else Fields(value, f"{self.source}: {name}")

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """So many numbers; all 1 where the field is missing."""
        value = self.get(name)
        value = [1.0] * count if value is None else value
        plain = isinstance(value, list) and all(
            type(one) in (int, float) and abs(one) <= 1e9 for one in value
        )
        if not (plain and len(value) == count):
            raise self.refuse(name, f"must be {count} numbers")
        return tuple(map(float, value))

    def layers(self, name: str, kinds: Collection[str], num_layers: int) -> list[str] | None:
        """One of ``kinds`` per layer, None where the field is missing."""
        value = self.get(name)
        if value is not None and not (
            isinstance(value, list)
            and len(value) == num_layers
            and all(isinstance(one, str) and one in kinds for one in value)
        ):
            raise self.refuse(name, f"must name {num_layers} layers, each one of {', '.join(kinds)}")
        return value

    def indices(self, name: str, low: int, high: int) -> list[int] | None:
        """A list of layers, each from ``low`` to ``high`` and once, None where the field is missing."""
        value = self.get(name)
        if value is not None and not (
            isinstance(value, list)
            and all(type(index) is int and low <= index <= high for index in value)
            and len(set(value)) == len(value)
        ):
            raise self.refuse(name, f"must list layers {low} to {high}, each once")
        return value

    def rope(
        self, fraction: float = 1.0, theta: float = 10000.0, stretched: bool = False
    ) -> tuple[float, float]:
        """(base of the frequencies, share of the channels that turn), in either way of writing them.

        stretched: YaRN, of which `yarn` says the rest, is no problem.
        """
        theta, fraction = self.get("rope_theta", theta), self.get("partial_rotary_factor", fraction)
        for name in ("rope_scaling", "rope_parameters"):
            nested = self.sub(name)
            if nested is None:
                continue
            known = ("yarn",) if stretched else ()
            nested.only("rope_type", "default", *known)
            nested.only("type", "default", "mrope", *known)
            nested.ignore(*(YARN if nested.yarns() else ()))
            nested.ignore("mrope_section", "mrope_interleaved")  # a text token has one position on all axes
            theta = nested.get("rope_theta", theta)
            fraction = nested.get("partial_rotary_factor", fraction)
            nested.finish()
        if theta <= 0:
            raise self.refuse("rope_theta", "must be above 0")
        return theta, fraction

    def yarns(self) -> bool:
        """Whether this, the mapping of a rotation, asks for YaRN."""
        return "yarn" in (self.values.get("rope_type"), self.values.get("type"))

    def yarn(self, every: bool) -> tuple[float, ...]:
        """The setting of `hybridlm.rotary`, with the defaults of transformers; (): positions as they are.

        every: whether mscale_all_dim is of all logits, as in DeepSeek-V3's attention.
        """
        mappings = [self.sub(name) for name in ("rope_scaling", "rope_parameters")]
        nested = next((one for one in mappings if one and one.yarns()), None)
        if nested is None:
            return ()
        nested.only("truncate", True)
        nested.only("attention_factor", None)
        context = self.get("max_position_embeddings", 0)
        values = [nested.get("factor", 0.0), float(nested.get("original_max_position_embeddings", context))]
        for name, missing in zip(YARN[:2], (32.0, 1.0), strict=True):
            values.append(nested.get(name, missing) or missing)
        mscale, of_all = (nested.get(name, 0.0) for name in YARN[2:4])
        if of_all and not (every and mscale):
            problem = "needs mscale beside it" if every else "is of DeepSeek-V3's attention alone"
            raise nested.refuse("mscale_all_dim", problem)
        if min(values[:2]) < 1:
            name = "factor" if values[0] < 1 else "original_max_position_embeddings"
            raise nested.refuse(name, "must be at least 1")
        return (*values, mscale, of_all) if of_all else (*values, 1.0, 0.0)

    def finish(self) -> None:
        """Refuses fields that were not taken, unless they are off."""
        for name in self.values:
            if name not in self.taken and self.values[name]:
                raise self.refuse(
                    name, "is a field that this importer does not know", "Remove it if it is inert."
                )
