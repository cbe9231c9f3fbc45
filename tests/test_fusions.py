"""Bytes of kernels in a compiled module, of one written by hand and of one compiled here."""

import jax
import jax.numpy as jnp

from benchmarks import fusions

MODULE = """HloModule m

%fused (param_0: f32[4,100], param_1: s32[]) -> bf16[1,100] {
  %param_0 = f32[4,100]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,100]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,100}
  ROOT %small = bf16[1,100]{1,0} convert(%row)
}

%body (p: (s32[], bf16[1,100], f32[4,100])) -> (s32[], bf16[1,100], f32[4,100]) {
  %p = (s32[], bf16[1,100]{1,0}, f32[4,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,100]{1,0} get-tuple-element(%p), index=2
  %row_fusion = bf16[1,100]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/row"}
  ROOT %out = (s32[], bf16[1,100]{1,0}, f32[4,100]{1,0}) tuple(%i, %row_fusion, %x)
}

ENTRY %main (a: (s32[], bf16[1,100], f32[4,100])) -> f32[4,4] {
  %a = (s32[], bf16[1,100]{1,0}, f32[4,100]{1,0}) parameter(0)
  %loop = (s32[], bf16[1,100]{1,0}, f32[4,100]{1,0}) while(%a), condition=%c, body=%body, COUNT
  %y = f32[4,100]{1,0} get-tuple-element(%loop), index=2
  ROOT %product = f32[4,4]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
""".replace("COUNT", 'backend_config={"known_trip_count":{"n":"3"}}')


def test_a_module_by_hand():
    """A row of four is read in each of three turns; a product reads both operands."""
    row, product = fusions.kernels(MODULE)
    assert (row.group, row.label, row.times) == ("element-wise", "row", 3)
    assert row.bytes == 3 * (100 * 4 + 4 + 100 * 2)
    assert (product.group, product.bytes) == ("products", 2 * 1600 + 64)
    assert "0.00 GB products" in fusions.table([row, product], 5)


def test_what_is_compiled_here():
    """Of a sum of a million numbers: they are read once, and at most written and read once more."""
    compiled = jax.jit(lambda x: jnp.sum(jnp.sin(x))).lower(jnp.zeros(1 << 20)).compile()
    found = fusions.kernels(compiled.as_text())
    assert 4 << 20 <= sum(one.bytes for one in found) < 4 * (4 << 20)
