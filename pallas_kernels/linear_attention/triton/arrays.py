"""The arrays of these kernels by name: their axes, and the part of each that a program is given."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.triton.inputs import Inputs, Spec
from pallas_kernels.linear_attention.triton.launch import launch
from pallas_kernels.linear_attention.triton.tiles import BF16, F32, C

# B sequences, T tokens, H value heads, N chunks of C tokens, K and V features; the gradient of x is dx.
AXES = {
    **dict.fromkeys(("q", "k", "queries", "keys", "w", "steps"), "BTHK"),
    **dict.fromkeys(("v", "u", "o", "values"), "BTHV"),
    **dict.fromkeys(("beta", "sum", "enter", "leave", "q_row", "k_row"), "BHT"),
    **dict.fromkeys(("scores", "inverse", "kk", "qk"), "BHTC"),
    **dict.fromkeys(("state", "final", "first"), "BHKV"),
    "total": "BHNK",
    "states": "BHNVK",
}
FLOAT32 = ("total", "steps", "state", "final", "first", "beta", "sum", "q_row", "k_row")  # bf16: the others
CHUNK = {"T": C, "N": None}


def run(
    spec: Spec,
    kernel: Callable[..., None],
    name: str,
    given: Sequence[Any],
    results: Sequence[str],
    cut: Mapping[str, int | None] = CHUNK,
    **options: Any,
) -> dict[str, jax.Array]:
    """Results of ``kernel`` by name, a program for each head and each part that ``cut`` makes of some axes.

    given: `Inputs`, or arrays by name.  cut: by axis the size of a part, None for 1.  options: of `launch`.
    """
    sizes = spec.sizes
    part = lambda name: block(spec, name, cut)
    parts = [_inputs(spec, x) if isinstance(x, Inputs) else {name: part(name) for name in x} for x in given]
    dtype = lambda name: F32 if name.removeprefix("d") in FLOAT32 else BF16
    shape = lambda name: tuple(sizes[axis] for axis in AXES[name.removeprefix("d")])
    return launch(
        kernel,
        name,
        grid=(next(sizes[axis] // (size or 1) for axis, size in cut.items()), sizes["H"], sizes["B"]),
        in_specs=parts,
        out_specs={name: part(name) for name in results},
        out_shape={x: jax.ShapeDtypeStruct(shape(x), dtype(x)) for x in results},
        interpret=spec.interpret,
        **options,
    )(*given)


def block(spec: Spec, name: str, cut: Mapping[str, int | None] = CHUNK, group: int = 1) -> pl.BlockSpec:
    """group: value heads that share a head."""
    axes = AXES[name.removeprefix("d")]
    shape = [None if axis in "BH" else cut.get(axis, spec.sizes[axis]) for axis in axes]

    def place(n: Any, h: Any, b: Any) -> tuple[Any, ...]:
        at = {"B": b, "H": h // group if group > 1 else h} | dict.fromkeys(cut, n)
        return tuple(at.get(axis, 0) for axis in axes)

    return pl.BlockSpec(tuple(shape), place)


def _inputs(spec: Spec, inputs: Inputs) -> Inputs:
    token = pl.BlockSpec((None, C), lambda c, h, b: (b, c))
    documents = inputs.documents and dict.fromkeys(inputs.documents, token)
    if documents:
        documents["carry"] = pl.BlockSpec((None, None), lambda c, h, b: (b, c))
    return Inputs(
        q=block(spec, "q", group=spec.group),
        k=block(spec, "k", group=spec.group),
        v=block(spec, "v"),
        steps=None if inputs.steps is None else block(spec, "steps"),
        rows={name: block(spec, name) for name in inputs.rows},
        documents=documents,
        masks=inputs.masks if inputs.masks is None else pl.BlockSpec(inputs.masks.shape, lambda *_: (0,) * 4),
    )
