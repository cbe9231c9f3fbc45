"""A byte-level hybrid on the source text of Python's standard library: no download, minutes on two CPU cores.

    python train.py --config=configs/quickstart.py

Every mixer of `hybridlm.config.STANDARD` can take KDA's place: --config.model.pattern="(gdn*3 full)*2".
"""

from ml_collections import ConfigDict

from hybridlm.config import data, default


def get_config() -> ConfigDict:
    config = default()
    config.model.pattern = "kda*3 full"
    config.model.d_model = 256
    config.model.vocab_size = 257  # bytes, and the separator of documents
    config.model.tie_embeddings = True
    config.model.dtype = "float32"  # CPUs emulate bfloat16
    config.model.remat = "none"
    for name in (
        "kda", "deltanet", "gdn", "hgrn2", "retnet", "deltaproduct", "gdp", "lightning", "mlstm",
        "featuremap", "comba", "gdn2",
    ):  # fmt: skip
        config.mixers[name].head_dim = 64  # their defaults are meant for a d_model of 1024 and more
    config.data = data("text", path="python-stdlib:")
    config.train.steps = 300
    config.train.batch_size = 4
    config.train.seq_len = 512
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 40
    config.checkpoint.every_steps = 150
    config.eval.every_steps = 50
    config.eval.batches = 32
    config.eval.sample_prompt = "def "
    config.eval.sample_tokens = 256
    config.eval.temperature = 0.8
    return config
