"""NVIDIA's Hopper KDA as a peer of benchmarks/kernels.py: PyTorch, and CUDA kernels compiled at run time.

Package nvidia-cudnn-frontend (1.32.0), its plan kda_hopper_cuda and no other, which needs torch,
cuda-bindings, NVRTC and CUDA's headers (CUDA_HOME), neither cutlass-dsl nor tvm-ffi.
"""

from typing import Any

import numpy as np
from peers import ACCURACY_SHAPE, Fla, Shape


class Nvidia(Fla):
    """As `Fla`, but for the convention of its inputs.

    q, k bf16, already normalised; log-decay (natural, per channel) and beta, which must be in (0, 1), and
    their gradients float32; K = V = 128, as many value heads as heads; all rows in one axis of tokens. So
    times hold no normalisation, and twice the bytes of ours for the decay. For the accuracy PyTorch
    normalises q and k.
    """

    name = "nvidia"
    cases = ("plain", "steep")  # of the others beta is up to 2

    def __init__(self) -> None:
        super().__init__()
        from cudnn.linear_attention.ops import kimi_delta_attention

        self.fn = kimi_delta_attention
        self.normalised = False
        self.ends = self.boundaries(ACCURACY_SHAPE)

    def boundaries(self, shape: Shape) -> Any:
        """Where sequences end, from 0: rows, or documents in them."""
        starts = np.arange(0, shape.tokens, shape.document or shape.tokens)
        rows = np.arange(shape.batch)[:, None] * shape.tokens
        ends = np.append(rows + starts, shape.batch * shape.tokens)
        return self.torch.tensor(ends, dtype=self.torch.int32, device="cuda")

    def normal(self, x: Any) -> Any:
        return self.torch.nn.functional.normalize(x.float(), dim=-1).bfloat16()

    def leaves(self, x: dict[str, Any]) -> dict[str, Any]:
        rounded = {name: value.flatten(0, 1).bfloat16() for name, value in x.items()}
        gates = {name: rounded[name].float() for name in ("g", "beta")}
        return {n: value.detach().requires_grad_(n != "do") for n, value in (rounded | gates).items()}

    def draw(self, op: str, shape: Shape) -> dict[str, Any]:
        if op != "kda":
            raise ValueError("kda only")
        self.ends, self.normalised = self.boundaries(shape), True
        x = super().draw(op, shape._replace(document=0, decay="bfloat16"))
        return x | {name: self.normal(x[name]).detach().requires_grad_() for name in ("q", "k")}

    def attend(self, op: str, x: dict[str, Any], final: bool) -> Any:
        q, k = (x[name] if self.normalised else self.normal(x[name]) for name in ("q", "k"))
        o, state = self.fn(
            q, k, x["v"], x["g"], x["beta"], self.ends, output_final_state=final, plan_name="kda_hopper_cuda"
        )  # fmt: skip
        return o, state.mT if final else state
