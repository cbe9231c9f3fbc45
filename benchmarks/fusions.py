"""What each kernel of a training step reads and writes, without a GPU: where its element-wise time goes.

    JAX_PLATFORMS=cpu python -m benchmarks.fusions --config=configs/hybrid.py:340m,kda,3:1 --top=40 \
        --config.model.pattern="kda*2" --config.model.num_layers=2 --config.model.remat=most \
        --config.model.scan=False

Compiles the step for one H100 as `hybridlm.ahead` does, which takes what that takes, and counts in the
compiled program: a slice that is read counts as the slice, an update in place as the update; what caches save
does not count. Few layers are enough: what one more adds is the difference. Nothing is tuned here, so
products are not those that a GPU runs, and attention is the blockwise one. Prints bytes by group, then the
element-wise kernels, alike ones together: bytes in all, how many, the arrays of at least 1 MB that one reads
and what it writes, what JAX calls it.
"""

import argparse
import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from hybridlm import ahead
from hybridlm import config as configs

BYTES = {"pred": 1, "bf16": 2, "f16": 2}
INSTRUCTION = re.compile(r"  (ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
FREE = ("get-tuple-element", "bitcast", "parameter", "tuple", "constant", "after-all")
LARGE = 1e6  # bytes of an array that is listed


class Instruction(NamedTuple):
    """name, type, op and the names of the operands; rest: all after the operands; root: what is returned."""

    name: str
    type: str
    op: str
    operands: list[str]
    rest: str
    root: bool


class Kernel(NamedTuple):
    """reads: (type, bytes) of each operand.  writes: of what comes out.  times: how often it runs."""

    name: str
    group: str
    label: str
    reads: tuple[tuple[str, int], ...]
    writes: tuple[str, int]
    times: int

    @property
    def bytes(self) -> int:
        return self.times * (self.writes[1] + sum(size for _, size in self.reads))


def size(type_: str) -> int:
    """Bytes of an array, or of all of a tuple: bf16[2,3]{1,0}."""
    found = re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", type_)
    each = lambda dtype: BYTES.get(dtype) or int(re.sub(r"\D", "", dtype[1:3]) or 8) // 8
    return sum(each(dtype) * math.prod(int(d) for d in dims.split(",") if d) for dtype, dims in found)


def kernels(hlo: str) -> list[Kernel]:
    """Of a compiled module, in its order; bodies of loops as often as XLA knows that they run."""
    computations, entry = parse(hlo)
    return list(_walk(computations, entry, 1))


def parse(hlo: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """(instructions by name, by computation; the name of the entry)."""
    found: dict[str, dict[str, Instruction]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if begins := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = begins[2]
            found[name] = {}
            entry = name if begins[1] else entry
        elif name and (one := INSTRUCTION.match(line)):
            depth, end = 1, 0
            for end, letter in enumerate(one[5]):  # noqa: B007
                depth += (letter == "(") - (letter == ")")
                if not depth:
                    break
            operands = re.findall(r"%([\w.\-]+)", one[5][:end])
            found[name][one[2]] = Instruction(one[2], one[3], one[4], operands, one[5], bool(one[1]))
    return found, entry


def _walk(computations: dict[str, dict[str, Instruction]], name: str, times: int) -> Iterator[Kernel]:
    here = computations[name]
    for one in here.values():
        if one.op in FREE or one.op.endswith("-done"):
            continue
        called = re.search(r"(?:body|calls|to_apply)=%?([\w.\-]+)", one.rest)
        if one.op in ("while", "call"):
            known = re.search(r"known_trip_count\D*(\d+)", one.rest)
            yield from _walk(
                computations, called[1] if called else "", times * (int(known[1]) if known else 1)
            )
            continue
        inside = computations[called[1]] if called and one.op.startswith("fusion") else {}
        types = [here[operand].type for operand in one.operands if operand in here]
        sizes = [_read(inside, i, type_) for i, type_ in enumerate(types)] if inside else map(size, types)
        label = re.search(r'op_name="([^"]*)"', one.rest)
        yield Kernel(
            one.name,
            _group(computations, one),
            "/".join(label[1].split("/")[1:]) if label else "",
            tuple(zip(map(_plain, types), sizes, strict=True)),
            (_plain(one.type), _written(inside, one.type)),
            times,
        )


def _plain(type_: str) -> str:
    return re.sub(r"\{[^}]*\}", "", type_)


def _read(inside: dict[str, Instruction], number: int, type_: str) -> int:
    """Bytes that a fusion reads of its operand ``number``."""
    [name] = [x.name for x in inside.values() if x.op == "parameter" and x.rest.startswith(f"{number})")]
    total, todo = 0, [name]
    while todo:
        of = todo.pop()
        for user in (x for x in inside.values() if of in x.operands):
            if user.op in ("bitcast", "convert", "reshape"):
                todo.append(user.name)
            elif user.op in ("slice", "dynamic-slice", "gather") and user.operands[0] == of:
                total += size(user.type) * size(type_) // max(size(inside[of].type), 1)
            elif user.op != "dynamic-update-slice" or user.operands[0] != of:
                return size(type_)
    return min(total, size(type_))


def _written(inside: dict[str, Instruction], type_: str) -> int:
    root = next((x for x in inside.values() if x.root), None)
    if root is None:
        return size(type_)
    parts = [inside[name] for name in root.operands] if root.op == "tuple" else [root]
    update = lambda x: inside[x.operands[1]] if x.op == "dynamic-update-slice" else x
    return sum(size(update(x).type) for x in parts)


def _group(computations: dict[str, dict[str, Instruction]], one: Instruction) -> str:
    """products, kernels (custom calls) or element-wise, by what is inside."""
    todo, seen = [one], ""
    while todo:
        x = todo.pop()
        seen += f" {x.op} {x.rest if x.op == 'custom-call' else ''}"
        for called in re.findall(r"calls=%?([\w.\-]+)", x.rest):
            todo += computations[called].values()
    if " dot " in seen or "gemm" in seen or "cublas" in seen:
        return "products"
    return "kernels" if "custom-call" in seen else "element-wise"


def table(found: list[Kernel], top: int) -> str:
    """Groups, then element-wise kernels that read and write alike."""
    groups, alike = collections.Counter[str](), collections.defaultdict[tuple, list[Kernel]](list)
    for one in found:
        groups[one.group] += one.bytes
        if one.group == "element-wise":
            alike[re.sub(r"[\d.]+$", "", one.name), one.label, one.reads, one.writes].append(one)
    lines = [f"{total / 1e9:9.2f} GB {group}" for group, total in groups.most_common()]
    large = lambda arrays: " ".join(type_ for type_, n in arrays if n >= LARGE) or "-"
    for (_, label, reads, writes), ones in sorted(alike.items(), key=lambda x: -sum(k.bytes for k in x[1]))[
        :top
    ]:
        total, count = sum(one.bytes for one in ones), sum(one.times for one in ones)
        lines.append(
            f"{total / 1e6:9.1f} MB {count:3d} x {ones[0].name}: {large(reads)} -> {writes[0]} {label}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--top", type=int, default=40)
    args, rest = parser.parse_known_args()
    given = dict(field.removeprefix("--config.").split("=", 1) for field in rest)
    sizes = {f"train.{name}": str(getattr(args, name)) for name in ("batch_size", "seq_len")}
    overrides = sizes | {"mesh.data": "1", "mesh.fsdp": "1"} | given
    _, done = ahead.compiled_step(configs.resolve(configs.load(args.config, overrides)), "h100:1")
    print(table(kernels(done.run.as_text()), args.top))


if __name__ == "__main__":
    main()
