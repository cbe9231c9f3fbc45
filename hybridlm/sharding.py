"""Where arrays live on the device mesh: one table from logical axes to mesh axes, applied everywhere.

Mesh axes: ``data`` (replicas of everything), ``fsdp`` (parameters and optimiser state cut along the model
width), ``context`` (sequences cut, and parameters as by fsdp; the mesh has it only where it is above 1),
``tensor`` (heads, MLP features and vocabulary cut). A batch is cut over data and fsdp together.
The mesh is made with Auto axis types: XLA inserts the collectives, guided by the shardings of parameters
and by `constrain` at block boundaries; only ops whose kernels XLA cannot cut, and those that hand something
along a cut sequence (`hybridlm.pieces`), run under `per_shard`. All of it is inert without a mesh context
(`jax.set_mesh`) or on one device.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hybridlm import schema
from hybridlm.errors import ConfigError

log = logging.getLogger("hybridlm")

MESH_AXES = ("data", "fsdp", "context", "tensor")
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "time": ("context",),
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "taps": (),
}

Axes = Sequence[str | None]


def make_mesh(config: schema.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of sizes ``config`` (one may be -1: the rest) over ``devices`` or all.

    A mesh smaller than the machine uses the first devices and says so; a larger one is a ConfigError.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.over(len(devices))
    total = math.prod(sizes.values())
    for name, size in config.sizes().items():
        fixed = total // sizes[name]
        if size == -1 and len(devices) % fixed:
            problem = f"the other mesh axes multiply to {fixed}, which does not divide {len(devices)} devices"
            raise ConfigError(f"mesh.{name}", size, problem)
    if total > len(devices) or (total < len(devices) and jax.process_count() > 1):
        problem = f"must multiply to the number of devices, {len(devices)}"
        raise ConfigError("mesh", sizes, problem, "Set mesh.data=-1.")
    if total < len(devices):
        log.warning("mesh %s uses %d of %d devices", sizes, total, len(devices))
    names = tuple(n for n in MESH_AXES if n in sizes and (n != "context" or sizes[n] > 1))
    shape, types = tuple(sizes[name] for name in names), (AxisType.Auto,) * len(names)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices[:total])


def sequences_over(count: int) -> contextlib.AbstractContextManager[Any]:
    """A mesh of the first ``count`` devices, over which sequences and caches are cut; none of one."""
    most = len(jax.devices())
    if not 1 <= count <= most:
        raise ConfigError("--context", count, f"must be 1 to the number of devices here, {most}")
    if count == 1:
        return contextlib.nullcontext()
    return jax.set_mesh(make_mesh(schema.Mesh(1, 1, 1, count), jax.devices()[:count]))


@cache
def _say_whole(what: str, logical: str, size: int, parts: int) -> None:
    told = "%s: axis %r of %d is not divisible by %d (%s); it stays whole"
    log.warning(told, what, logical, size, parts, RULES[logical])


@cache
def _say_gathered(what: str) -> None:
    log.warning("%s takes whole sequences: mesh.context gathers them there, and saves nothing", what)


def spec(
    axes: Axes, shape: Sequence[int], mesh: Mapping[str, int], what: str = "activation"
) -> PartitionSpec:
    """The partition of an array of ``shape`` with logical ``axes`` on a mesh of sizes ``mesh``.

    A dimension that its mesh axes do not divide stays whole, logged once with ``what`` it is; of two
    dimensions that want the same mesh axis the first gets it.
    """
    entries: list[tuple[str, ...] | None] = []
    for logical, size in zip(axes, shape, strict=True):
        names = tuple(n for n in _axes(logical, mesh) if not any(n in (e or ()) for e in entries))
        parts = math.prod(mesh[name] for name in names)
        if logical and parts > 1 and size % parts:
            if logical != "time":  # prompts and single tokens have any length; training's is checked
                _say_whole(what, logical, size, parts)
            names = ()
        entries.append(names or None)
    return PartitionSpec(*entries)


def param_shardings(metadata: Any, shapes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each parameter. metadata: leaves with ``.axes``; shapes: the tree of `init`."""

    def sharding(path: tuple, shape: Any, meta: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(meta.axes, shape.shape, mesh.shape, jax.tree_util.keystr(path)))

    return jax.tree_util.tree_map_with_path(sharding, shapes, metadata)


def state_shardings(shapes: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings of a whole training state: a leaf whose path ends in a parameter's path lies where that lies.

    shapes: tree of ShapeDtypeStruct; params: `param_shardings`. Anything else (step, counts) is replicated.
    """
    by_path = dict(jax.tree_util.tree_leaves_with_path(params))

    def sharding(path: tuple, _: Any) -> NamedSharding:
        tails = (by_path.get(path[start:]) for start in range(len(path)))
        return next((found for found in tails if found), NamedSharding(mesh, PartitionSpec()))

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def _axes(logical: str | None, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of ``mesh`` that a logical axis is cut over."""
    return tuple(name for name in RULES[logical] if name in mesh) if logical else ()


def batch_sharding(mesh: Mesh, dims: int = 2) -> NamedSharding:
    """Of arrays [B, T, ...], or without T with ``dims`` 1: rows over data and fsdp, time over context."""
    cut = (RULES["batch"], *([RULES["time"]] if dims > 1 and "context" in mesh.shape else []))
    return NamedSharding(mesh, PartitionSpec(*cut))


def batch_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which of ``batch_size`` rows the devices of this process hold, ascending."""
    held = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held if index is not None]))


def put_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int | None = None
) -> dict[str, jax.Array]:
    """The host arrays of ``batch`` as global arrays [batch_size, ...] on the mesh.

    batch: of this process's rows (`batch_rows`) of ``batch_size``; None: it holds the whole batch.
    """
    shapes = {name: (batch_size or len(array), *array.shape[1:]) for name, array in batch.items()}
    return jax.make_array_from_process_local_data(batch_sharding(mesh), dict(batch), shapes)


def _current() -> Mapping[str, int] | None:
    """Sizes of the mesh in context, None when there is none or it is a single device.

    Without the axes that a `shard_map` around this has cut already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    sizes = {n: mesh.shape[n] for n in mesh.axis_names if n not in mesh.manual_axes}
    return sizes if math.prod(sizes.values()) > 1 else None


def parts(logical: str) -> int:
    """Among how many devices of the mesh in context an axis is cut that they divide."""
    mesh = _current()
    return 1 if mesh is None else math.prod(mesh[name] for name in _axes(logical, mesh))


def cut(axes: Axes, shape: Sequence[int]) -> PartitionSpec | None:
    """`spec` on the mesh in context; None without one."""
    mesh = _current()
    return None if mesh is None else spec(axes, shape, mesh)


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """``x`` held to the partition of its logical ``axes``; the identity without a mesh."""
    where = cut(axes, x.shape)
    return x if where is None else jax.lax.with_sharding_constraint(x, where)


def per_shard(
    fn: Callable[..., Any], in_axes: Sequence[Axes | None], out_axes: Sequence[Axes | None]
) -> Callable[..., Any]:
    """``fn`` run on each device's own rows and heads (`jax.shard_map`), where XLA could not cut it itself.

    fn: takes arrays or None, returns a tuple of arrays or None, and treats every position along the named
        axes independently (heads in groups that stay together), or, along "time", exchanges over the mesh
        axis "context" what it must (`hybridlm.pieces`).
    in_axes, out_axes: logical axes of each argument and result; None for one that is None.
    A logical axis is cut only where its mesh axes divide it in every argument that has it (grouped value
    heads must stay with their key head); otherwise it stays whole, logged once.
    """

    def call(*args: Any) -> Any:
        mesh = _current()
        if mesh is None:
            return fn(*args)
        sizes: dict[str, list[int]] = {}
        for axes, x in zip(in_axes, args, strict=True):
            for name, size in () if x is None else zip(axes or (), x.shape, strict=True):
                if name:
                    sizes.setdefault(name, []).append(size)
        cut = {}
        for name in sizes:
            axes = _axes(name, mesh)
            parts = math.prod(mesh[axis] for axis in axes)
            whole = [size for size in sizes[name] if size % parts]
            if whole and name != "time":
                _say_whole("recurrence", name, whole[0], parts)
            elif axes and not whole:
                cut[name] = axes
        if "context" in mesh and "time" not in sizes and "batch" in sizes:
            _say_gathered(getattr(fn, "__qualname__", str(fn)).split(".")[0])

        def specs(axes: Axes | None) -> PartitionSpec | None:
            return None if axes is None else PartitionSpec(*(cut.get(n) if n else None for n in axes))

        in_specs = tuple(None if x is None else specs(a) for a, x in zip(in_axes, args, strict=True))
        out_specs = tuple(map(specs, out_axes))
        return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)

    return call
