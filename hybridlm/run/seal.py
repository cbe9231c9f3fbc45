"""SHA-256 sums of a checkpoint's files, so that damage is seen before it is trained on.

A seal is the file SHA256SUMS in the directory, in the format of `sha256sum`: `sha256sum -c SHA256SUMS` checks
it too. Neither Orbax nor zarr has checksums of array data.
"""

import functools
import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hybridlm import untrusted

NAME = "SHA256SUMS"
THREADS = 4
PIECES, PIECE = 256, 4096  # of a file, and bytes
LATE = ("_CHECKPOINT_METADATA", "commit_success.txt")  # written by Orbax after the seal; neither has arrays


def write(directory: Path) -> None:
    """Seals the files that lie in ``directory`` now."""
    sums = _sums(directory)
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    untrusted.write_text(directory / NAME, text)


def damage(directory: Path) -> str | None:
    """What differs from the seal, in words; None when nothing does, or when there is no seal."""
    if not (directory / NAME).exists():
        return None
    expected, found = listed(directory), _sums(directory)
    if not expected:
        return f"{NAME} is itself damaged"
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not in {NAME}"
        if found[name] != expected[name]:
            return f"{name} is not what was written (SHA-256 differs)"
    return None


def identity(directory: Path) -> str:
    """What tells the checkpoint in ``directory`` from others, of the same step too; "" without a seal."""
    path = directory / NAME
    return _digest(path)[:16] if path.exists() else ""


def sampled(files: Iterable[Path]) -> str:
    """What tells files from others without a seal: their names and sizes, and pieces of each, evenly spread.

    Files of up to PIECES * PIECE bytes are read whole; of a longer one a change may lie between the pieces,
    but no training changes so little.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        found = path.stat()
        digest.update(_sampled(path, found.st_size, found.st_mtime_ns))
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=4096)  # stages and members ask again
def _sampled(path: Path, size: int, changed: int) -> bytes:
    digest = hashlib.sha256(f"{path.name} {size}\n".encode())
    with path.open("rb") as file:
        for n in range(PIECES):
            file.seek(max(n * PIECE, n * (size - PIECE) // (PIECES - 1)))
            digest.update(file.read(PIECE))
    return digest.digest()


def listed(directory: Path) -> dict[str, str]:
    """The seal's files, name -> sum; {} if it is itself damaged, OSError if there is none."""
    lines = (directory / NAME).read_text(errors="replace").splitlines()
    if not all(re.fullmatch(r"[0-9a-f]{64}  .+", line) for line in lines):
        return {}
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def _sums(directory: Path) -> dict[str, str]:
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    kept = {name: path for name, path in files.items() if name not in (NAME, *LATE)}
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(kept, pool.map(_digest, kept.values()), strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
