"""Products in 8 bits against NumPy with explicit rounding, in float64."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hybridlm import compiler
from hybridlm import scaled_matmul as sm
from tests import hopper_aot

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def rounded(x, dtype):
    """What an 8-bit copy of ``x`` stands for, float64."""
    x = np.asarray(x, np.float32)
    exponent = 0
    while np.abs(x).max() * 2.0 ** (exponent + 1) <= LARGEST[dtype]:
        exponent += 1
    while np.abs(x).max() * 2.0**exponent > LARGEST[dtype]:
        exponent -= 1
    return (x * np.float32(2.0**exponent)).astype(dtype).astype(np.float64) / 2.0**exponent


def product(x, w, dy):
    y, back = jax.vjp(lambda x, w: sm.scaled_matmul(x, w, ("embed", "mlp")), x, w)
    return y, *back(dy)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_product_and_gradients(dtype, tolerance):
    rng = np.random.default_rng(0)
    make = lambda shape, size: jnp.asarray(rng.standard_normal(shape) * size, dtype)
    x, w, dy = make((2, 24, 48), 3.0), make((48, 32), 0.02), make((2, 24, 32), 1e-4)
    got = jax.jit(product)(x, w, dy)
    assert [part.dtype for part in got] == [dtype] * 3
    X, W, G = rounded(x, E4M3), rounded(w, E4M3), rounded(dy, E5M2)
    want = X @ W, G @ W.T, np.einsum("btf,btg->fg", X, G)
    exact = [np.asarray(array, np.float64) for array in (x, w, dy)]
    for part, expected in zip(got, want, strict=True):
        error = np.abs(np.asarray(part, np.float64) - expected).max() / np.abs(expected).max()
        assert error < tolerance
    assert np.abs(want[0] - exact[0] @ exact[1]).max() > 0.01 * np.abs(want[0]).max()  # 8 bits are few


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_scale(dtype):
    """The largest power of two that keeps every value in the format; what is not finite stays so."""
    largest = float(jnp.finfo(dtype).max)
    quantize = jax.jit(lambda x: sm.quantize(x, dtype))
    for value, scale in ((largest, 1), (largest * 1.01, 0.5), (largest / 2, 2), (1e-3, None), (0, 1)):
        found = quantize(jnp.asarray([value, -value / 3, 0.0], jnp.float32))
        assert np.isfinite(np.asarray(found.value, np.float32)).all()
        assert scale is None or found.scale == scale
        assert abs(float(found.value[0]) / float(found.scale) - value) <= value / 8
    for value in (np.inf, -np.inf, np.nan):
        found = quantize(jnp.asarray([1.0, value, 2.0], jnp.float32))
        assert not np.isfinite(np.asarray(found.value, np.float32)).all()
        y, dx, dw = product(jnp.asarray([[1.0, value]]), jnp.ones((2, 1)), jnp.ones((1, 1)))
        assert not np.isfinite(y).all() and not np.isfinite(dw).all() and np.isfinite(dx).all()


@pytest.mark.slow
def test_cublas_takes_all_three_products_on_an_h100():
    bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    arguments = bf16(2, 512, 256), bf16(256, 512), bf16(2, 512, 512)
    text = hopper_aot.compiled(product, arguments, compiler.NO_PRODUCTS).as_text()
    assert text.count('custom_call_target="__cublas$lt$matmul$f8"') == 3
    assert not re.search(r"= bf16\[[\d,]*\]\S* (dot|convert)\(", text)
