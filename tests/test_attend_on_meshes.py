"""Softmax attention in a loop over layers, on a mesh: what XLA is given, for GPUs that are not here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from hybridlm.rows import Rows
from hybridlm.softmax_attention import attend
from pallas_kernels.dispatch import H100, compiled_for


def empty_inputs(operation):
    """Of every manual computation in it, the inputs without an element that the computation uses."""
    for region in operation.regions:
        for block in region.blocks:
            if operation.name == "sdy.manual_computation":
                yield from (arg for arg in block.arguments if 0 in arg.type.shape and list(arg.uses))
            for inner in block.operations:
                yield from empty_inputs(inner.operation)


@pytest.mark.parametrize(
    ("axis", "options"),
    [("fsdp", {}), ("context", {}), ("context", {"window": 16})],
    ids=["rows", "ring", "windows of pieces"],
)
def test_nothing_empty_goes_into_a_manual_computation(axis, options, monkeypatch):
    """jaxlib 0.11 ends with a segmentation fault where something does: cuDNN's absent bias did."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91400)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda _: False)
    q, ids = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def loss(q, ids):
        layer = lambda x: attend(x, x, x, Rows(ids, ids), scale=0.125, **options)
        twice = lambda run: lambda x: jax.lax.scan(lambda x, _: (run(x), None), x, None, length=2)[0]
        return twice(twice(jax.checkpoint(layer)))(q).astype(jnp.float32).sum()

    sizes = [2 if name == axis else 1 for name in ("data", "fsdp", "context", "tensor")]
    mesh = AbstractMesh(tuple(sizes), ("data", "fsdp", "context", "tensor"), (AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh), compiled_for(H100):
        lowered = jax.jit(jax.grad(loss)).trace(q, ids).lower(lowering_platforms=("cuda",))
    module = lowered.compiler_ir("stablehlo").operation
    text = str(module)
    assert "sdy.manual_computation" in text and "fmhaSoftmaxBackward" in text
    assert not list(empty_inputs(module))
