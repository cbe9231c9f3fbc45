"""Multi-query associative recall, two layers, the mixture of lengths and pairs of the Based paper.

    python train.py --config=configs/mqar.py:kda
    python train.py --config=configs/mqar.py:"gla full"

The argument is a pattern of mixer names, repeated to two layers; kda if left out. The task is defined in
`hybridlm.data.mqar`. Rows hold 256 tokens, so shorter examples are packed, and slices are weighted by rows:
the paper trains on 100k examples of (64, 4) and 20k of each other slice. Unlike there, layers have an MLP, no
convolution but the mixer's own, and an endless supply of examples.
"""

from ml_collections import ConfigDict

from hybridlm.config import data, default


def get_config(arg: str = "kda") -> ConfigDict:
    config = default()
    config.model.pattern = arg
    config.model.num_layers = 2
    config.model.d_model = 128
    config.model.vocab_size = 8192
    config.model.tie_embeddings = True
    config.model.dtype = "float32"
    config.model.remat = "none"
    for name in (
        "kda", "deltanet", "gdn", "hgrn2", "retnet", "deltaproduct", "gdp", "lightning", "mlstm",
        "featuremap", "comba", "gdn2",
    ):  # fmt: skip
        config.mixers[name].update(num_heads=2, head_dim=64)
    config.mixers.gla.num_heads = 2
    config.data = data("mqar", slices="(64, 4, 5), (128, 8, 2), (256, 16, 4), (256, 32, 4), (256, 64, 4)")
    config.train.steps = 20_000
    config.train.batch_size = 64
    config.train.seq_len = 256
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.final_ratio = 0.0
    config.checkpoint.every_steps = 5000
    config.eval.every_steps = 1000
    return config
