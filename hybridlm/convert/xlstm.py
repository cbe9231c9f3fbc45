"""xLSTM: mLSTM layers with exponential gates, a SwiGLU after each, and capped logits.

Source: transformers 5.24, models/xlstm.
"""

from typing import Any

from hybridlm import config as configs
from hybridlm import mlps
from hybridlm.convert.family import Architecture, Family, kinds, outline, settings, types
from hybridlm.convert.fields import MAX_LAYERS, Fields
from hybridlm.errors import ConfigError
from hybridlm.model import Definition

FORMAT = "xlstm"
IDLE = (
    "mode", "chunkwise_kernel", "sequence_kernel", "step_kernel", "chunk_size",
    "autocast_kernel_dtype", "inference_state_dtype", "return_last_states", "max_inference_chunksize",
    "norm_reduction_force_float32",
)  # fmt: skip


def read(fields: Fields) -> Architecture:
    layers = fields.either("num_hidden_layers", "num_blocks", 32, MAX_LAYERS)
    d_model = fields.either("hidden_size", "embedding_dim", 4096)
    eps = fields.get("norm_eps", 1e-6)
    fields.only("add_out_norm", True)
    fields.ignore(*IDLE)
    [(kind, own)] = kinds(FORMAT).values()
    definition = configs.mixer(kind, **own.read(fields, d_model, eps))
    hidden = mlps.load("swiglu").public[FORMAT].read(fields, d_model, eps)["hidden"]
    cap = fields.get("output_logit_soft_cap", 30.0)
    model = settings(fields, d_model, eps, mlp_hidden=hidden, logit_cap=cap)
    return Architecture([kind] * layers, {kind: definition}, {}, model)


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    types(definition, FORMAT)  # refuses layers of other kinds
    if not definition.model.logit_cap:
        raise ConfigError("model.logit_cap", 0.0, "must be above 0 in this format")
    return outline(
        definition, FAMILY, model_type, embedding_dim=definition.d_model,
        num_blocks=len(definition.layers), output_logit_soft_cap=definition.model.logit_cap,
    )  # fmt: skip


FAMILY = Family(
    FORMAT, {"xlstm": "xLSTM"}, read, write, norms=("norm_mlstm", "norm_ffn"),
    embedding="backbone.embeddings.weight", body="backbone.", final_norm="out_norm", layers="blocks",
)  # fmt: skip
