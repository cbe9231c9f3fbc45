"""What a layer sees besides its input, and what it leaves for others: later layers, losses, whoever looks.

A Context lives during one call of one layer. Layers that are scanned, rematerialised or decoded all get one,
and the stack hands on what they wrote:

    context.carried["values"] = v_BTHV       # a later layer reads context.carried["values"]
    context.record("loss.balance", loss)     # added to the objective (names that begin with "loss.")
    context.record("q", q_BTHK)              # a tap: kept only if somebody asked for "q"
"""

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

import jax

from hybridlm.rows import Rows


@dataclasses.dataclass
class Context:
    """rows: documents and positions of the tokens.
    layer, num_layers: this layer's index in the stack (traced in a scan) and the stack's depth.
    shared: this layer's row of its kind's stack-wide parameters (`mixers.TokenMixer.Shared`), or None.
    carried: what earlier layers wrote, by name: any pytrees of fixed shapes. Reading a name that no earlier
        layer writes is a KeyError while tracing.
    wanted: patterns of the names of records that somebody asked for.
    records: what this layer recorded, of those.
    """

    rows: Rows
    layer: Any = 0
    num_layers: int = 1
    shared: Any = None
    carried: dict[str, Any] = dataclasses.field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    records: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def record(self, name: str, value: jax.Array) -> None:
        """Keeps ``value`` under ``name`` if it is wanted; else it costs nothing. A name once a layer."""
        if any(fnmatchcase(name, pattern) for pattern in self.wanted):
            if name in self.records:
                raise ValueError(f"record {name!r}: written twice in one layer")
            self.records[name] = value

    def with_time(self) -> "Context":
        """For a mixer that wants a time axis: the rows of a decode step as rows of one token."""
        rows = Rows(self.rows.segment_ids[:, None], self.rows.positions[:, None])
        return dataclasses.replace(self, rows=rows)  # carried and records are the same dicts
