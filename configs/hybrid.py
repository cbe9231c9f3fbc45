"""Linear mixers against hybrids against attention, matched in depth, width and parameters.

    python train.py --config=configs/hybrid.py:340m,kda,3:1
    python train.py --config=configs/hybrid.py:1.3b,full

The argument is SIZE,MIXER,RATIO, or SIZE,full, SIZE,mla or SIZE,fox for attention alone. SIZE: 340m, 1.3b.
MIXER: deltanet, gdn, kda, gla, hgrn, hgrn2, retnet, swa, mamba2, mamba, deltaproduct, gdp, lightning, rglru,
mlstm, featuremap, based, comba, gdn2, rwkv6, rwkv7, s4d, loglinear, mom, sse, or the kind's own name. RATIO,
linear to full, of 24:

    pure   no full layer
    24:1   1: layer 23                   24 layers hold no period of 25, so the last layer is the full one
    12:1   2: layers 11, 23              nor two of 13: the last of each half
    6:1    3: layers 6, 13, 20           from here on periods of r + 1 layers, their last one full
    3:1    6: layers 3, 7, ... 23
    1:1   12: layers 1, 3, ... 23
    1in6, 1in3   4 and 8: one full layer in every 6 or 3

The last line is what "6:1" and "3:1" are said to mean in the checkpoints released with the study that these
shapes and ratios come from (arXiv 2507.06457); 24:1 and 12:1 have as many full layers either way.

Parameters: a layer of gdn has 6 d^2, of gdp 8.25 d^2, of retnet 8 d^2, of attention 4 d^2, and published
"340M" configs differ by 1.37. Here mlp_hidden takes up the difference, so that every stack of a size has the
parameters of its transformer within 1%. (GDN keeps num_heads * head_dim = 0.75 d_model, its authors' rule.
The memories of mom share one projection of keys and one of values: with their own, they alone would have more
parameters than the transformer.)

Stacks that share keys and values, or have parallel heads, are patterns of their own (docs/mixers.md):
--config.model.pattern="full:a full@a" or "parallel". Their parameters are not matched.

Optimiser, batch and context are flame's 340M recipe; 20B tokens for 340m and 100B for 1.3b, as in the study.
Its learning rates are unpublished: 1e-3 is flame's at 340M, 4e-4 the Gated DeltaNet paper's at 1.3B. Tokens
come from shards that `python -m hybridlm.data.prepare` wrote, with any tokenizer of at most 32000 ids.
"""

from ml_collections import ConfigDict

from hybridlm import config as configs
from hybridlm import cost, pattern
from hybridlm.errors import ConfigError, nearest

LAYERS = 24
SIZES = {
    "340m": {"d_model": 1024, "batch_size": 128, "steps": 38_400, "learning_rate": 1e-3},
    "1.3b": {"d_model": 2048, "batch_size": 256, "steps": 95_400, "learning_rate": 4e-4},
}
TRANSFORMER = {"340m": 373_867_520, "1.3b": 1_364_297_728}  # parameters of SIZE,full, counted by a test
MIXERS = (
    "deltanet", "gdn", "kda", "gla", "hgrn", "hgrn2", "retnet", "swa",
    "mamba2", "mamba", "deltaproduct", "gdp", "lightning", "rglru", "mlstm",
    "featuremap", "based", "comba", "gdn2", "rwkv6", "rwkv7", "s4d", "loglinear", "mom", "sse",
)  # fmt: skip
FULL = ("full", "mla", "fox")
RATIOS = {
    "pure": (),
    "24:1": (23,),
    "12:1": (11, 23),
    "6:1": range(6, LAYERS, 7),
    "3:1": range(3, LAYERS, 4),
    "1:1": range(1, LAYERS, 2),
    "1in6": range(5, LAYERS, 6),
    "1in3": range(2, LAYERS, 3),
}


def get_config(arg: str = "340m,kda,3:1") -> ConfigDict:
    size, mixer, ratio = _parse(arg)
    config = configs.default()
    config.model.d_model = SIZES[size]["d_model"]
    config.model.num_layers = LAYERS
    config.model.vocab_size = 32_000
    config.model.remat = "auto"
    config.data = configs.data("shards", path="data/fineweb-edu")
    config.mixers.mom.single_kv = True
    config.model.pattern = pattern.ratio(mixer, "full", 1, LAYERS, RATIOS[ratio])
    config.model.mlp_hidden = cost.matched_mlp_hidden(configs.resolve(config), TRANSFORMER[size])
    config.train.steps = SIZES[size]["steps"]
    config.train.batch_size = SIZES[size]["batch_size"]
    config.train.seq_len = 4096
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.optimizer.learning_rate = SIZES[size]["learning_rate"]
    config.optimizer.warmup_steps = 1024
    config.optimizer.eps = 1e-15
    config.eval.every_steps = 1000
    return config


def _parse(arg: str) -> tuple[str, str, str]:
    """(size, mixer, ratio); ConfigError says what is allowed."""
    size, mixer, ratio = [*(part.strip() for part in arg.split(",")), "", ""][:3]
    kinds = {configs.STANDARD[name][0]: name for name in MIXERS if name != "swa"}
    mixer = {**kinds, "attention": "full"}.get(mixer, mixer)
    if mixer in FULL and not ratio:
        ratio = "pure"
    form = "must be SIZE,MIXER,RATIO, for example 340m,kda,3:1, or SIZE,full"
    for what, value, known in (
        ("size", size, SIZES),
        ("mixer", mixer, (*MIXERS, *FULL)),
        ("ratio", ratio, RATIOS),
    ):
        if value not in known:
            listed = f"{what} {value!r} is none of {', '.join(known)}"
            raise ConfigError("--config", f"hybrid.py:{arg}", f"{form}; {listed}", nearest(value, known))
    if (mixer == "full" and ratio != "pure") or arg.count(",") > 2:
        raise ConfigError("--config", f"hybrid.py:{arg}", form)
    return size, mixer, ratio
