"""What the arguments of the linear-attention ops must be; errors name the argument."""

import contextlib
import math

import jax

DTYPES = ("bfloat16", "float16", "float32", "float64")


def floating(name: str, x: jax.Array, ndim: int, exact: bool = False) -> jax.Array:
    """``x`` if it is a floating array of at least (or exactly) ``ndim`` axes."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise ValueError(f"{name} = {x!r}: must be an array")
    if str(x.dtype) not in DTYPES:
        raise ValueError(f"{name}.dtype = {x.dtype}: must be one of {', '.join(DTYPES)}")
    if len(x.shape) != ndim and (exact or len(x.shape) < ndim):
        raise ValueError(f"{name}.shape = {x.shape}: must have {'' if exact else 'at least '}{ndim} axes")
    return x


def expect(name: str, x: jax.Array | None, shapes: set[tuple[int, ...]]) -> None:
    if x is None:
        return
    if floating(name, x, 0).shape not in shapes:
        allowed = " or ".join(str(shape) for shape in sorted(shapes, key=len))
        raise ValueError(f"{name}.shape = {x.shape}: must be {allowed} to match q and v")


def heads_fit(name: str, shape: tuple[int, ...], heads: int, value_heads: int) -> None:
    if heads < 1 or value_heads < 1 or value_heads % heads:
        raise ValueError(f"{name}.shape = {shape}: its {value_heads} heads must be a multiple of q's {heads}")


def scale_of(scale: float | None, key_dim: int) -> float:
    if scale is None:
        return key_dim**-0.5
    with contextlib.suppress(TypeError, ValueError, jax.errors.JAXTypeError):
        if math.isfinite(scale):
            return float(scale)
    raise ValueError(f"scale = {scale!r}: must be a finite Python number (or None for K**-0.5)")
