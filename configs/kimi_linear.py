"""Kimi Linear (arXiv 2510.26692): three KDA layers to one full MLA layer, no position embedding anywhere.

    python train.py --config=configs/kimi_linear.py --config.mesh.data=1 --config.mesh.fsdp=8

The attention stack of the released 48B model: 27 layers, every fourth one MLA and the last one too, 32 heads
of 128, d_model 2304. Its mixture of experts is not offered here: every layer has a dense SwiGLU instead.
Vocabulary, data and context are those of `configs/hybrid.py`.

MLA keeps the 64 key channels that all heads share but does not rotate them (rope_theta 0). Muon is not
MuonClip: attention logits are not clipped.
"""

from ml_collections import ConfigDict

from hybridlm.config import data, default, mixer


def get_config() -> ConfigDict:
    config = default()
    config.model.pattern = "(kda*3 mla)*6 kda*2 mla"
    config.model.d_model = 2304
    config.model.norm_eps = 1e-5
    config.mixers.kda = mixer("kda", num_heads=32, output_gate_bias=False)
    config.mixers.mla = mixer("mla", num_heads=32, rope_theta=0.0, norm_eps=1e-5)
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
