"""Rules: which tensors of a public checkpoint are which parameters here, and how they are laid out.

A rule joins a few parameters (``ours``, canonical names of `hybridlm.stack`) with a few tensors
(``theirs``) and maps the arrays both ways. A family is a list of rules; the same list imports and exports.
The shapes that a checkpoint must have follow from those of the parameters by running ``outward`` on empty
stand-ins.

PyTorch's Linear stores [out, in], a Linear here [in, out]; a depthwise Conv1d [channels, 1, taps], here
[taps, channels].
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from hybridlm.errors import ConfigError

Arrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
    """inward: theirs -> ours; outward: ours -> theirs.

    loose: other shapes of the same size are accepted too, cut along the first axis (checkpoints in
        circulation differ there); an export repeats what was imported.
    shapes: of tensors that follow from config.json and are no parameters here (`derived`).
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    inward: Callable[[Arrays], Arrays]
    outward: Callable[[Arrays], Arrays]
    loose: bool = False
    shapes: tuple[tuple[int, ...], ...] = ()

    def under(self, ours: str, theirs: str) -> "Rule":
        """The same rule with prefixes."""
        return dataclasses.replace(
            self,
            ours=tuple(ours + name for name in self.ours),
            theirs=tuple(theirs + name for name in self.theirs),
        )

    def their_shapes(self, our_shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        if self.shapes:
            return list(self.shapes)
        stand_ins = [np.broadcast_to(np.zeros((), bool), shape) for shape in our_shapes]
        return [array.shape for array in self.outward(stand_ins)]


def regroup(arrays: Arrays, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """The same numbers in other shapes: everything after another, then cut."""
    if [array.shape for array in arrays] == list(shapes):
        return list(arrays)
    flat = np.concatenate([array.reshape(-1) for array in arrays])
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes, strict=True)]


def same(ours: str, theirs: str, *, loose: bool = False) -> Rule:
    return Rule((ours,), (theirs,), list, list, loose)


def derived(theirs: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> Rule:
    """A tensor that a checkpoint may lack; one that it has must be what ``make`` says, but for rounding."""

    def inward(arrays: Arrays) -> Arrays:
        rounding = 1e-5 if arrays[0].dtype == np.float32 else 0.02
        if not np.allclose(arrays[0].astype(np.float32), make(), atol=rounding):
            raise ConfigError("--hf", theirs, "is not what follows from config.json")
        return []

    return Rule((), (theirs,), inward, lambda arrays: [make()], shapes=(shape,))


def reshaped(ours: str, theirs: str, shape: Callable[[int], tuple[int, ...]]) -> Rule:
    """A vector here; ``shape`` of its size there, or any other of that size."""
    return Rule(
        (ours,),
        (theirs,),
        lambda arrays: [array.reshape(-1) for array in arrays],
        lambda arrays: [array.reshape(shape(array.size)) for array in arrays],
        loose=True,
    )


def transposed(ours: str, theirs: str) -> Rule:
    each = lambda arrays: [array.T for array in arrays]
    return Rule((ours,), (theirs,), each, each)


def linear(ours: str, theirs: str) -> Rule:
    return transposed(f"{ours}.kernel", f"{theirs}.weight")


def bias(ours: str, theirs: str) -> Rule:
    return same(f"{ours}.bias", f"{theirs}.bias")


def permuted(ours: str, theirs: str, order: np.ndarray) -> Rule:
    """A Linear whose outputs here are those of there in another ``order``."""
    back = np.argsort(order)
    return Rule(
        (f"{ours}.kernel",),
        (f"{theirs}.weight",),
        lambda arrays: [arrays[0][order].T],
        lambda arrays: [arrays[0].T[back]],
    )


def norm(ours: str, theirs: str) -> Rule:
    return same(f"{ours}.scale", f"{theirs}.weight")


def conv(ours: str, theirs: str) -> Rule:
    return Rule(
        (f"{ours}.kernel",),
        (f"{theirs}.weight",),
        lambda arrays: [array[:, 0].T for array in arrays],
        lambda arrays: [array.T[:, None] for array in arrays],
    )


def low_rank(ours: str, theirs: str, biased: bool = True) -> list[Rule]:
    """`hybridlm.rwkv.LowRank` and RWKV's in FLA."""
    both = [
        transposed(f"{ours}.A", f"{theirs}.lora.0.weight"),
        transposed(f"{ours}.B", f"{theirs}.lora.2.weight"),
    ]
    return both + [same(f"{ours}.bias", f"{theirs}.lora.2.bias")] * biased


def short_convs(ours: str, theirs: str, taps: int) -> list[Rule]:
    """FLA's, by their first letters on both sides; none where there are no ``taps``."""
    pairs = zip(ours, theirs, strict=True) if taps else ()
    return [conv(f"{one}_conv", f"{other}_conv1d") for one, other in pairs]


def convs(ours: Sequence[str], theirs: Sequence[str]) -> Rule:
    """Neighbouring convolutions whose published tensors may be cut elsewhere along the channels."""
    one = conv("", "")
    return Rule(
        tuple(f"{name}.kernel" for name in ours),
        tuple(f"{name}.weight" for name in theirs),
        one.inward,
        one.outward,
        loose=True,
    )


def concatenated(
    ours: Sequence[str], widths: Sequence[int], theirs: str, one: Callable[[str, str], Rule]
) -> Rule:
    """Several parameters in one tensor, along its first axis; ``one``: `linear` or `conv`."""
    parts = [one(name, theirs) for name in ours]
    cuts = np.cumsum(widths)[:-1]
    return Rule(
        tuple(part.ours[0] for part in parts),
        parts[0].theirs,
        lambda arrays: parts[0].inward(np.split(arrays[0], cuts)),
        lambda arrays: [np.concatenate(parts[0].outward(arrays))],
    )


def divided(ours: str, theirs: Sequence[str], widths: Sequence[int], one: Callable[[str, str], Rule]) -> Rule:
    """The reverse of `concatenated`: one parameter in several tensors."""
    parts = [one(ours, name) for name in theirs]
    cuts = np.cumsum(widths)[:-1]
    return Rule(
        parts[0].ours,
        tuple(part.theirs[0] for part in parts),
        lambda arrays: parts[0].inward([np.concatenate(arrays)]),
        lambda arrays: np.split(parts[0].outward(arrays)[0], cuts),
    )


def interleaved(ours: Sequence[str], widths: Sequence[int], theirs: str) -> Rule:
    """Several Linears in one tensor by head: rows are [first of head 0, second of head 0, ..., of head 1].

    widths: rows that each has in a group.
    """
    cuts = np.cumsum(widths)[:-1]

    def inward(arrays: Arrays) -> Arrays:
        grouped = arrays[0].reshape(-1, sum(widths), arrays[0].shape[1])
        return [part.reshape(-1, part.shape[-1]).T for part in np.split(grouped, cuts, axis=1)]

    def outward(arrays: Arrays) -> Arrays:
        grouped = [a.T.reshape(-1, width, a.shape[0]) for a, width in zip(arrays, widths, strict=True)]
        fused = np.concatenate(grouped, axis=1)
        return [fused.reshape(-1, fused.shape[-1])]

    return Rule(tuple(f"{name}.kernel" for name in ours), (f"{theirs}.weight",), inward, outward)


def experts(ours: str, theirs: str, count: int) -> Rule:
    """[experts, in, out] here, one [out, in] tensor per expert there; ``theirs`` has {} for the number."""
    return Rule(
        (ours,),
        tuple(theirs.format(index) for index in range(count)),
        lambda arrays: [np.stack([array.T for array in arrays])],
        lambda arrays: [array.T for array in arrays[0]],
    )


def fused_experts(ours: Sequence[str], theirs: str) -> Rule:
    """[experts, in, out] each here, one [experts, sum of out, in] there; equal widths."""
    turn = lambda array: np.swapaxes(array, 1, 2)
    return Rule(
        tuple(ours),
        (theirs,),
        lambda arrays: [turn(part) for part in np.split(arrays[0], len(ours), axis=1)],
        lambda arrays: [np.concatenate([turn(array) for array in arrays], axis=1)],
    )


def swiglu_rules(ours: str = "", theirs: str = "") -> list[Rule]:
    return [linear(f"{ours}{name}", f"{theirs}{name}_proj") for name in ("gate", "up", "down")]


def fused_rules(hidden: int, ours: str = "", theirs: str = "") -> list[Rule]:
    """Granite's: gate and up in one tensor."""
    names = f"{ours}gate", f"{ours}up"
    fused = concatenated(names, (hidden, hidden), f"{theirs}input_linear", linear)
    return [fused, linear(f"{ours}down", f"{theirs}output_linear")]


def relu2_rules(ours: str = "", theirs: str = "") -> list[Rule]:
    return [linear(f"{ours}{name}", f"{theirs}{name}_proj") for name in ("up", "down")]
