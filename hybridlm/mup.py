"""muP: hyper-parameters that carry over widths (Yang & Hu et al. 2022, Tensor Programs V, arXiv:2203.03466).

With g = d_model / model.mup_base_width, after table 8 (the form in which embeddings may be tied):

| parameter | initial deviation | AdamW's rate | Muon's rate | in the forward pass |
|---|---|---|---|---|
| hidden matrix: its inputs grow with the width | g^-1/2 | g^-1 | g^-1/2; g^-1 if its outputs do not grow | |
| head | 1 | 1 | (AdamW) 1 | logits / g |
| everything else: embedding, taps, norms, biases, from a fixed rank | 1 | 1 | 1 | |

all times what they are without muP, so that nothing changes at the base width but this: softmax attention
scales its logits by 8 / K instead of K^-1/2 (definition 4.1; equal at head size K = 64). Linear mixers keep
their scales: hold their head sizes over widths, as the defaults do. The second column is 1 where a kind's
deviation follows the number of inputs already (RWKV, RG-LRU, the outputs of Mamba-2 and mLSTM). What is
multiplied into a rate is divided out of the decay beside it, so that rate * decay holds over widths
(independent decay: Wortsman et al. 2023, arXiv:2309.14322). Muon's updates have singular values alike, of
0.2 max(in, out)^1/2 here, and what must not grow is (in / out)^1/2 times that (Yang, Simon & Bernstein
2023, arXiv:2310.17813). Adam's ``eps`` is left alone. Everything is taken to grow alike: with d_model, the
number of heads (of groups, of key-value heads) and mlp_hidden; ranks are held.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hybridlm import schema
from hybridlm.errors import ConfigError

GROWS = ("embed", "heads", "kv_heads", "mlp")  # logical axes that are taken to grow with the width
HEAD_DIM = 64  # at which 1/K attention is the usual


def growth(config: schema.Model) -> float:
    """g; 1 without muP."""
    return config.d_model / config.mup_base_width if config.mup_base_width else 1.0


def logit_scale(head_dim: float, mup: bool) -> float:
    """What softmax attention multiplies q . k by."""
    return HEAD_DIM**0.5 / head_dim if mup else head_dim**-0.5


def hidden(meta: Any) -> bool:
    """Whether a parameter is a matrix [..., in, out] of hidden layers with inputs that grow."""
    is_matrix = meta.decay or meta.cast  # low ranks of RWKV have no decay
    return is_matrix and len(meta.axes) > 1 and meta.axes[-2] in GROWS and meta.axes[-1] != "vocab"


def init_factor(meta: Any, growth: float) -> float:
    """Of the initial value."""
    return growth**-0.5 if hidden(meta) and meta.plain else 1.0


def factors(meta: Any, growth: float, muon: bool) -> tuple[float, float]:
    """Of (learning rate, weight decay). muon: whether it is Muon that changes the parameter."""
    if not hidden(meta):
        return 1.0, 1.0
    rate = growth ** (-0.5 if muon and meta.axes[-1] in GROWS else -1.0)
    return rate, 1 / rate


def check(config: schema.Model, mixers: Mapping[str, Any]) -> None:
    """ConfigError for a rank that would grow with the width, of which the factors know nothing."""
    if not config.mup_base_width:
        return
    for name, mixer in mixers.items():
        base = mixer.explicit(config.mup_base_width)
        for field in (field.name for field in dataclasses.fields(mixer) if field.name.endswith("_rank")):
            value = getattr(base, field)
            if not getattr(mixer, field) and value:
                fix = f"Set the rank of the base width, {value}."
                raise ConfigError(f"mixers.{name}.{field}", 0, "grows with the width; muP holds ranks", fix)
