"""From a Transformer to a hybrid: the teacher's layers but some are given another mixer and learn from it.

    python train.py --config=configs/linearise.py:teacher=runs/x,gdn,3:1
    python train.py --config=configs/linearise.py:teacher=hf/qwen,kda,pure --config.data.path=text/*.txt

The argument is teacher=FOLDER,MIXER,RATIO.
FOLDER: a run's workdir, or a Hugging Face folder, which brings its tokenizer and no data.
MIXER: a name of `hybridlm.config.STANDARD`; of two, gla+swa, each layer has both and the mean of what they
return (Liger).
RATIO: r:1 keeps the last layer of every r + 1, "pure" none; or the indices of those to keep: 3+7+11
(`python -m hybridlm.layer_choice` finds some). "gates" has both everywhere and learns which to keep.

Three stages (docs/linearise.md): transfer, each new mixer alone learns to return what the attention in its
place returned; distil, the whole learns the teacher's logits; tune, next-token prediction without a teacher.
Their learning rates are RADLADS' (arXiv 2505.03005) in shape; their lengths are short:
set stages.<name>.train.steps.
"""

import dataclasses
import itertools
from collections.abc import Iterable

from ml_collections import ConfigDict

from hybridlm import config as configs
from hybridlm import init_from, mixers, pattern, plan, schema, untrusted, weights
from hybridlm.errors import ConfigError, nearest
from hybridlm.mixers import attention

FORM = "must be teacher=FOLDER,MIXER,RATIO, for example teacher=runs/x,gdn,3:1"
FROZEN = (
    "embedding", "head", "final_norm.scale", "layers.*.mixer_norm.*", "layers.*.mlp_norm.*", "layers.*.mlp.*",
)  # fmt: skip
STEPS = {"transfer": 1000, "distil": 3000, "tune": 500}
GATES, CHOOSE = "gates", 300  # steps in which the gates alone are trained
COMPOSED = "parallel", "sharedblock", "loglinear", "mom", "sse"  # which are made of others
OFFERED = tuple(name for name in configs.STANDARD if name not in COMPOSED)
KEPT = "kept_"  # before names of the teacher's mixers that new ones have too


def get_config(arg: str = "") -> ConfigDict:
    folder, mixer, ratio = _parse(arg)
    theirs = init_from.described(folder)
    values = theirs.to_dict()
    values.pop("stages", None)
    names = pattern.fill(pattern.parse(theirs.model.pattern), theirs.model.num_layers)
    full = [i for i, name in enumerate(names) if _attention(theirs, name)]
    if not full:
        problem = "the teacher has no layer of softmax attention without a window"
        raise ConfigError("--config", f"linearise.py:{arg}", problem)
    replaced = set(full) - set(_kept(ratio, len(names), arg))
    for reader, left in pattern.sources(names).items():
        if left in replaced and reader not in replaced:
            problem = f"layer {reader} stays and has the keys and values of layer {left}, which is replaced"
            raise ConfigError("--config", f"linearise.py:{arg}", problem, "Convert both, or neither.")
    learned = ratio == GATES
    placed = lambda name: f"{pattern.split(name)[0]}_or_{mixer}" if learned else mixer.replace("+", "_")
    source = theirs.mixers[pattern.split(names[full[0]])[0]]
    assert isinstance(source, attention.Config)
    own = _definitions(mixer, source, theirs.model.d_model)
    stay = {pattern.split(name)[0] for i, name in enumerate(names) if i not in replaced}
    kept = _kept_apart(theirs, stay, own, arg)
    new = [
        _renamed(name, placed(name)) if i in replaced else kept.get(pattern.split(name)[0], "") + name
        for i, name in enumerate(names)
    ]
    config = configs.default()
    for section in ("model", "train", "mlps", "data", "eval", "log", "checkpoint"):
        config[section] = ConfigDict(values[section])
    at = init_from.split(folder)[0]
    if config.data.kind == "text" and (at / weights.TOKENIZER).is_file():
        config.data.tokenizer = str(at / weights.TOKENIZER)
    if not (at / "checkpoints").is_dir():  # a public folder, whose text is to be named
        config.data = configs.data("text", tokenizer=config.data.tokenizer)
    config.model.pattern = str(plan.plan(new))
    config.model.update(_norms(theirs.model, zip(names, new, strict=True)))
    old = dict.fromkeys(pattern.split(names[i])[0] for i in full)
    pairs = {f"{name}_or_{mixer}": _pair(name, mixer, combine="gate", gate_penalty=0.1) for name in old}
    apart = {kept[name] + name: values["mixers"][name] for name in kept}
    config.mixers = ConfigDict(values["mixers"] | apart | own | (pairs if learned else {}))
    config.init_from = str(folder)
    config.objective = configs.objective("distil", teacher=str(folder))
    config.optimizer.update(learning_rate=1e-4, weight_decay=0.0, warmup_steps=50)
    bare = all((mlp := pattern.split(name)[1]) and theirs.mlps[mlp].kind == "none" for name in names)
    frozen = tuple(one for one in FROZEN if not (bare and ".mlp" in one))
    alone = {"kl": 0.0, "transfer": 1.0}
    config.stages = ConfigDict({
        "order": tuple(STEPS),
        "transfer": {
            "train": {"steps": STEPS["transfer"]}, "objective": alone,
            "optimizer": {"learning_rate": 1e-3, "freeze": frozen},
        },
        "distil": {"train": {"steps": STEPS["distil"]}},
        "tune": {
            "train": {"steps": STEPS["tune"]}, "objective": {"kind": "next_token"},
            "optimizer": {"learning_rate": 1e-5},
        },
    })  # fmt: skip
    if learned:
        still = tuple(f"layers.*.mixer.{one}" for one in ("gate", *(f"branches.{name}.*" for name in old)))
        config.stages.transfer.optimizer.freeze = (*frozen, *still)
        config.stages.choose = ConfigDict({
            "train": {"steps": CHOOSE},
            "optimizer": {"learning_rate": 2e-2, "freeze": ("*", "!layers.*.mixer.gate")},
        })  # fmt: skip
        config.stages.order = ("transfer", "choose")
    return config


def _kept_apart(theirs: configs.Config, stay: set[str], own: dict[str, dict], arg: str) -> dict[str, str]:
    """What stands before the names of those mixers of the teacher's that ``stay`` and are called as new ones
    are: settings under a name are of the new ones, as the command line says them. It stands twice where a
    teacher that was converted itself has the longer name already."""
    parts = mixers.with_parts(stay, theirs.mixers) - stay
    taken = sorted(name for name in parts & own.keys() if theirs.to_dict()["mixers"][name] != own[name])
    if taken:
        problem = f"the teacher's layers that stay are made of a mixer {taken[0]!r} with other settings"
        raise ConfigError("--config", f"linearise.py:{arg}", problem, "Convert those layers too.")
    free = lambda name: next(one for n in itertools.count(1) if (one := KEPT * n) + name not in theirs.mixers)
    return {name: free(name) for name in stay & own.keys()}


def _norms(model: schema.Model, layers: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Settings with which norms stand in layers (old name, new name) where they stood."""
    named = dict.fromkeys(tuple(pattern.split(name)[0] for name in pair) for pair in layers)
    streams = {
        f"{new}.{half}": model.stream(f"{old}.{half}") for old, new in named for half in ("mixer", "mlp")
    }
    return {
        "post_norm": tuple(dict.fromkeys(new for old, new in named if old in model.post_norm)),
        "stream_norm": tuple("{}={!r}/{!r}".format(half, *both) for half, both in streams.items() if both),
    }


def _definitions(mixer: str, source: attention.Config, d_model: int) -> dict:
    """By name, the settings of ``mixer``, or of both and of the layer that has both."""
    found = {name: _like(name, source, d_model) for name in mixer.split("+")}
    if "+" in mixer:
        found[mixer.replace("+", "_")] = _pair(*found, combine="sum", multipliers=(0.5, 0.5))
    return found


def _pair(first: str, second: str, **settings: object) -> dict:
    return configs.mixer("parallel", branches=(first, second), **settings).to_dict()


def _like(mixer: str, source: attention.Config, d_model: int) -> dict:
    """The settings of ``mixer`` with the heads of the teacher's attention, as `hybridlm.mapping` wants."""
    kind, standard = configs.STANDARD[mixer]
    heads, groups = source.heads(d_model)
    dim = source.head_dim
    if kind == "attention":
        return configs.mixer(**(dataclasses.asdict(source) | standard)).to_dict()
    wide = {"qk_nope_head_dim": dim, "qk_rope_head_dim": groups * dim, "kv_lora_rank": groups * dim}
    own = {
        "mla": {"v_head_dim": dim, "latent_norm": False, "rope_groups": groups, **wide},
        "mamba2": {"n_groups": heads, "state_size": dim},
    }
    wanted = {
        "num_heads": heads, "head_dim": dim, "v_head_dim": dim, "rope_theta": source.rope_theta,
        "yarn": source.yarn,
        "output_gate": "sigmoid" if kind == "kda" else "none", **standard, **own.get(kind, {}),
    }  # fmt: skip
    known = {field.name for field in dataclasses.fields(mixers.config_class(kind))}
    if source.yarn and "rope_theta" in known and "yarn" not in known:
        problem = f"rotates, and knows nothing of the yarn = {source.yarn} of the source's attention"
        raise ConfigError("--config", f"linearise.py:{mixer}", problem)
    return configs.mixer(kind, **{name: value for name, value in wanted.items() if name in known}).to_dict()


def _attention(config: configs.Config, name: str) -> bool:
    one = config.mixers[pattern.split(name)[0]]
    return isinstance(one, attention.Config) and one.full_attention


def _renamed(layer: str, mixer: str) -> str:
    _, mlp = pattern.split(layer)
    return f"{mixer}/{mlp}" if mlp else mixer


def _kept(ratio: str, layers: int, arg: str) -> list[int]:
    """Indices of the layers that stay as they are."""
    first, _, last = ratio.partition(":")
    if ratio in ("pure", GATES):
        return []
    if last == "1" and untrusted.digits(first) and 0 < int(first) < layers:
        return list(range(int(first), layers, int(first) + 1))
    indices = ratio.split("+")
    if all(untrusted.digits(one) and int(one) < layers for one in indices):
        return [int(one) for one in indices]
    problem = f"RATIO {ratio!r} is none of pure, gates, r:1 below {layers} layers and indices such as 3+7"
    raise ConfigError("--config", f"linearise.py:{arg}", f"{FORM}; {problem}")


def _parse(arg: str) -> tuple[str, str, str]:
    """(folder, mixer, ratio). A folder's name may hold commas."""
    head, *rest = arg.rsplit(",", 2)
    if not head.startswith("teacher=") or len(rest) != 2:
        raise ConfigError("--config", f"linearise.py:{arg}", FORM)
    mixer, ratio = (one.strip() for one in rest)
    each = mixer.split("+")
    for one in each:
        if one not in OFFERED:
            problem = f"{FORM}; mixer {one!r} is none of {', '.join(OFFERED)}"
            raise ConfigError("--config", f"linearise.py:{arg}", problem, nearest(one, OFFERED))
    if len(each) > 2 or len(set(each)) < len(each) or (len(each) == 2 and ratio == GATES):
        problem = f"{FORM}; two mixers are two names, as in gla+swa, and not for {GATES}"
        raise ConfigError("--config", f"linearise.py:{arg}", problem)
    return head.removeprefix("teacher="), mixer, ratio
