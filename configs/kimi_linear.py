"""Kimi Linear (arXiv 2510.26692): three KDA layers to one full MLA layer, no position embedding anywhere.

    python train.py --config=configs/kimi_linear.py --config.mesh.data=1 --config.mesh.fsdp=8

The attention stack of the released 48B model: 27 layers, every fourth one MLA and the last one too, 32 heads
of 128, d_model 2304. Every layer has a dense SwiGLU, unless the argument is "moe": then all but the first
have the released model's experts, 8 of 256 of width 1024 and a shared one (48B parameters, 3B a token).
Vocabulary, data and context are those of `configs/hybrid.py`.

MLA keeps the 64 key channels that all heads share but does not rotate them (rope_theta 0). Muon is MuonClip,
which clips attention logits, with --config.optimizer.qk_clip=100.
"""

from ml_collections import ConfigDict

from hybridlm.config import data, default, mixer, mlp
from hybridlm.errors import ConfigError


def get_config(arg: str = "dense") -> ConfigDict:
    if arg not in ("dense", "moe"):
        raise ConfigError(
            "--config", f"kimi_linear.py:{arg}", "must be kimi_linear.py:dense or kimi_linear.py:moe"
        )
    config = default()
    config.model.pattern = "(kda*3 mla)*6 kda*2 mla"
    config.model.d_model = 2304
    config.model.norm_eps = 1e-5
    config.mixers.kda = mixer("kda", num_heads=32, output_gate_bias=False, norm_eps=1e-5)
    config.mixers.mla = mixer("mla", num_heads=32, rope_theta=0.0)
    if arg == "moe":
        config.model.pattern = "kda kda/moe*2 mla/moe (kda/moe*3 mla/moe)*5 kda/moe*2 mla/moe"
        config.model.mlp_hidden = 9216
        config.mlps.moe = mlp(
            "moe", num_experts=256, top_k=8, hidden=1024, router="sigmoid", selection_bias=True, scale=2.446,
            shared_hidden=1024, balance_loss=0.001,
        )  # fmt: skip
    config.data = data("shards", path="data/fineweb-edu")
    config.train.steps = 50_000
    config.train.batch_size = 256
    config.train.seq_len = 4096
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.optimizer.name = "muon"
    config.optimizer.schedule = "wsd"
    config.optimizer.learning_rate = 1.1e-3
    config.optimizer.warmup_steps = 1000
    return config
