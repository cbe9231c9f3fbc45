"""What a layer sees besides its input, and what it leaves for others: later layers, losses, whoever looks.

A Context lives during one call of one layer. Layers that are scanned, rematerialised or decoded all get one,
and the stack hands on what they wrote:

    context.leave("values", v_BTHV)          # a later layer reads context.left("values")
    context.record("loss.balance", loss)     # added to the objective (names that begin with "loss.")
    context.record("q", q_BTHK)              # a tap: kept only if somebody asked for "q"
    context.record("max.logit", largest_H)   # the larger of microbatches; other records are added up
"""

import dataclasses
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybridlm.rows import Rows


class Left(NamedTuple):
    """What a layer left. written: whether it has yet; the scan of a stack makes room for it before that."""

    written: jax.Array
    value: Any


@dataclasses.dataclass
class Context:
    """rows: documents and positions of the tokens.
    layer, num_layers: this layer's index in the stack (traced in a scan) and the stack's depth.
    shared: this layer's row of its kind's stack-wide parameters (`mixers.TokenMixer.shared_class`), or the
        module itself, or None.
    carried: what earlier layers left, by name; see `leave` and `left`.
    wanted: patterns of the names of records that somebody asked for.
    records: what this layer recorded, of those.
    entered: what the stack was given, [B, T, D]: the embedding of the tokens, also where x is another.
    """

    rows: Rows
    layer: Any = 0
    num_layers: int = 1
    shared: Any = None
    carried: dict[str, Left] = dataclasses.field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    records: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    entered: Any = None

    def leave(self, name: str, value: Any) -> None:
        """Leaves ``value``, a pytree of fixed shapes, to later layers; the kind's Config.carries says so."""
        self.carried[name] = Left(jnp.bool_(True), value)

    def left(self, name: str, default: Any = None) -> Any:
        """What the last layer to leave ``name`` left; ``default``, of the same shapes, where none did yet.

        KeyError while tracing where none did and there is no default.
        """
        if name not in self.carried:
            if default is None:
                raise KeyError(f"layer {self.layer}: no earlier layer leaves {name!r}")
            return default
        found = self.carried[name]
        if default is None:
            return found.value
        return jax.tree.map(lambda new, old: jnp.where(found.written, new, old), found.value, default)

    def wants(self, name: str) -> bool:
        """Whether somebody asked for the record ``name``, for what costs something to compute."""
        return any(fnmatchcase(name, pattern) for pattern in self.wanted)

    def record(self, name: str, value: jax.Array) -> None:
        """Keeps ``value`` under ``name`` if it is wanted; else it costs nothing. A name once a layer."""
        if self.wants(name):
            if name in self.records:
                raise ValueError(f"record {name!r}: written twice in one layer")
            self.records[name] = value

    def branch(self) -> "Context":
        """For one of several parts of a layer: it leaves and reads the same, and has records of its own."""
        return dataclasses.replace(self, records={})

    def join(self, name: str, other: "Context") -> None:
        """Takes over the records of a `branch` called ``name``: as "<name>.<record>", losses added up."""
        for record, value in other.records.items():
            if record.startswith("loss."):
                self.records[record] = self.records.get(record, 0) + value
            else:
                self.records[f"{name}.{record}"] = value

    def with_time(self) -> "Context":
        """For a mixer that wants a time axis: the rows of a decode step as rows of one token."""
        rows = Rows(self.rows.segment_ids[:, None], self.rows.positions[:, None])
        entered = None if self.entered is None else self.entered[:, None]
        return dataclasses.replace(self, rows=rows, entered=entered)  # carried and records: the same dicts
