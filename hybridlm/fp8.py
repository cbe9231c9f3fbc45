"""``model.matmul = "fp8"``: which products of a training step are in 8 bits (`hybridlm.scaled_matmul`)."""

from typing import Any

import jax

from hybridlm import schema
from hybridlm.block import Spec, abstract, matrices
from hybridlm.errors import ConfigError
from hybridlm.scaled_matmul import MULTIPLE


def reasons(model: schema.Model, layers: tuple[Spec, ...]) -> dict[str, str]:
    """Why each matrix stays in the model's dtype, "" where it is in 8 bits: "kda mixer.q_proj" -> reason."""
    return {
        f"{spec.name} {name}": linear.why_not_fp8()
        for spec in dict.fromkeys(layers)
        for name, linear in matrices(abstract(model, spec)).items()
    }


def check(model: schema.Model, layers: tuple[Spec, ...]) -> None:
    """ConfigError unless anything of the layers is in 8 bits, where that is asked for."""
    if model.matmul == "fp8" and all(reasons(model, layers).values()):
        fix = f"It takes widths, d_model first, that are multiples of {MULTIPLE}; or set model.matmul=dtype."
        raise ConfigError("model.matmul", model.matmul, "is for no matrix of the layers", fix)


def said(model: schema.Model, layers: tuple[Spec, ...]) -> str:
    """How much is in 8 bits, what is not and why, for people."""
    found = reasons(model, layers)
    left: dict[str, list[str]] = {}
    for name, reason in found.items():
        if reason:
            left.setdefault(reason, []).append(name)
    count = f"{list(found.values()).count('')} of {len(found)} matrices of a layer of each kind"
    text = f"fp8{emulated(jax.devices()[0])} in training: {count}"
    listed = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in left.items())
    return f"{text}; in {model.dtype} {listed}" if left else text


def emulated(device: Any) -> str:
    """What is to be said of a device without 8-bit products; GPUs have them from capability 8.9 on."""
    capability = getattr(device, "compute_capability", "0") if device.platform == "gpu" else "0"
    return "" if float(capability) >= 8.9 else f" (emulated and no faster on {device.device_kind})"
