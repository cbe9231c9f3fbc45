"""Text for the studies of language models: what lies in the packages of a machine, some packages held out.

    python -m benchmarks.study_text --site SITE_PACKAGES --output text
    python -m hybridlm.data.prepare --input text/train.jsonl --val_input text/val.jsonl --tokenizer bytes \
        --output data/source

A document is a file of source, stubs, headers or documentation in UTF-8. Left out are files that were seen
but for their spaces, files of whose longer lines half or more were seen, and files that deflate makes nine
times smaller (tables, generated code). Which files come first, and so which of two copies stays, is decided
by their names. Held out are whole packages: what is measured is code of authors that were never read.
"""

import argparse
import functools
import hashlib
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

ENDINGS = (".py", ".pyi", ".pyx", ".pxd", ".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".md", ".rst", ".js")
HELD_OUT = "click,dateutil,einops,fsspec,httpx,jinja2,networkx,rich,tqdm"
SIZES = range(200, 1 << 20)  # bytes of a file that is read
LONGER = 24  # characters of a line that tells texts apart
SMALLER = 9.0  # times, by deflate


class Document(NamedTuple):
    package: str
    text: str
    same: bytes  # equal for texts that differ in spaces alone
    lines: frozenset[bytes]  # of its longer lines


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def document(site: Path, path: Path) -> Document | None:
    """What lies in ``path``, or None where that is no text that a study reads."""
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    if len(data) not in SIZES or len(data) > SMALLER * len(zlib.compress(data, 1)):
        return None
    lines = frozenset(digest(line) for line in map(str.strip, text.splitlines()) if len(line) >= LONGER)
    package = path.relative_to(site).parts[0].removesuffix(".py")
    return Document(package, text, digest("".join(text.split())), lines)


def documents(site: Path) -> Iterator[tuple[str, str]]:
    """(package, text) of the files that stay, in the order of their names; files are read by all cores."""
    paths = [p for p in sorted(site.rglob("*")) if p.suffix in ENDINGS and not p.is_symlink() and p.is_file()]
    whole: set[bytes] = set()
    lines_seen: set[bytes] = set()
    with ProcessPoolExecutor() as pool:
        for found in pool.map(functools.partial(document, site), paths, chunksize=32):
            if found is None or found.same in whole:
                continue
            if 2 * len(found.lines & lines_seen) >= max(1, len(found.lines)):
                continue
            whole.add(found.same)
            lines_seen |= found.lines
            yield found.package, found.text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--held_out", default=HELD_OUT, help="packages, separated by commas")
    flags = parser.parse_args()
    held_out = set(flags.held_out.split(","))
    flags.output.mkdir(parents=True)
    found: dict[str, dict[str, list[int]]] = {"train": {}, "val": {}}
    with open(flags.output / "train.jsonl", "w") as train, open(flags.output / "val.jsonl", "w") as val:
        for package, text in documents(flags.site):
            split, file = ("val", val) if package in held_out else ("train", train)
            file.write(json.dumps({"text": text}) + "\n")
            sums = found[split].setdefault(package, [0, 0])
            sums[0], sums[1] = sums[0] + 1, sums[1] + len(text.encode())
    for split, packages in found.items():
        files, size = (sum(one[i] for one in packages.values()) for i in (0, 1))
        largest = sorted(packages, key=lambda name: -packages[name][1])[:12]
        named = ", ".join(f"{name} {packages[name][1] / 1e6:.1f}" for name in largest)
        print(f"{split}: {files} files of {len(packages)} packages, {size / 1e6:.1f} MB (MB: {named})")


if __name__ == "__main__":
    main()
