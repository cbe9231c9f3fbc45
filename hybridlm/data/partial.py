"""A folder that appears under its name only when it is complete."""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from hybridlm import untrusted
from hybridlm.errors import ConfigError

LOCK = "lock"  # held with flock while somebody writes, so that what a kill left behind can be told
_OURS = re.compile(r"lock|index\.json|tokenizer\.json|(train|val)-\d{5,}\.(tokens|offsets)|\..*\.tmp")


@contextlib.contextmanager
def folder(final: Path, field: str) -> Iterator[Path]:
    """``final``.partial to write to, renamed to ``final`` if the body ends well and removed if it does not.

    What an earlier call left behind because it was killed is removed first; that of one that is still
    running, or a folder with anything else in it, is refused. ConfigError, naming ``field``, for that and
    for whatever the operating system refuses: no space, no permission, a limit of size.
    """
    partial = final.with_name(final.name + ".partial")
    handles: list[int] = []
    try:
        _clear(partial, field, final)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(field, str(final), "cannot be created", f"{error.strerror}.") from error
    try:
        handles.append(os.open(partial / LOCK, os.O_RDWR | os.O_CREAT))
        handles.append(os.dup(handles[0]))  # a descriptor in hand, since to remove a folder takes two
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handles[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
        os.remove(partial / LOCK)
        os.rename(partial, final)
        untrusted.sync_folder(final.parent)
    except OSError as error:
        _remove(partial, handles)
        said = f"{error.strerror or error}. Nothing was kept."
        raise ConfigError(field, str(final), "cannot be written", said) from error
    except BaseException:  # an interrupt too: an unfinished directory is of no use to anyone
        _remove(partial, handles)
        raise
    finally:
        for handle in handles:
            os.close(handle)


def _remove(partial: Path, handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())
    shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):
        partial.rmdir()  # which takes no descriptor, where the folder is empty


def _clear(partial: Path, field: str, final: Path) -> None:
    if not partial.exists():
        return
    names = os.listdir(partial)
    if LOCK in names and all(_OURS.fullmatch(name) for name in names):
        lock = os.open(partial / LOCK, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass
        else:
            shutil.rmtree(partial)
            return
        finally:
            os.close(lock)
    fix = "Delete it unless another prepare is running."
    raise ConfigError(field, str(final), f"has an unfinished {partial.name} beside it", fix)
