"""One run, or one sweep, per workdir: the file ``lock`` says who has it, and a second is refused.

Two safeguards together. `flock` is exact and ends with its process, however that died, but some network file
systems keep it to one host. So the owner also counts up a beat in the file, and a run on another host watches
for that before it takes a lock whose owner it cannot look up. Clocks of two hosts are never compared.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path

from hybridlm import untrusted
from hybridlm.errors import ConfigError, RunError

log = logging.getLogger("hybridlm")

BEAT_SECONDS = 10.0
BEATS_MISSED = 3  # after which an owner on another host counts as dead


class Lock:
    """Holds ``workdir``/lock while open; makes the folder. ConfigError when another has it."""

    def __init__(self, workdir: Path, beat_seconds: float = BEAT_SECONDS):
        self.path, self.beat_seconds = workdir / "lock", beat_seconds
        self.token, self.host, self.beats = secrets.token_hex(8), socket.gethostname(), 0
        self.lost = False
        self.ended = threading.Event()

    def __enter__(self) -> "Lock":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take()
        except BaseException:
            os.close(self.file)
            raise
        self.thread = threading.Thread(target=self._keep, name="lock", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        if self._read().get("token") == self.token:
            os.ftruncate(self.file, 0)
        os.close(self.file)

    def check(self) -> None:
        """RunError if another run took the lock meanwhile, which it may after missed beats."""
        if self.lost:
            owner = self._read()
            raise RunError(f"{self.path}: taken over by {_named(owner)}, which took this run for dead.")

    def _take(self) -> None:
        exact = True
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse(self._read())
        except OSError as error:
            exact = False
            log.info("%s: this file system has no flock (%s)", self.path, error.strerror)
        owner = self._read()
        if owner:
            if owner.get("host") != self.host:
                self._watch(owner)
            elif not exact and _runs(owner.get("pid", 0)):
                self._refuse(owner)
            log.warning("%s: left behind by %s, which is gone; taken over", self.path, _named(owner))
        self._beat()
        if not exact:  # of several that saw the same dead owner the last one to write has it
            time.sleep(min(1.0, self.beat_seconds))
            if (owner := self._read()).get("token") != self.token:
                self._refuse(owner)

    def _watch(self, owner: dict) -> None:
        """Returns when the owner on another host has not beaten for long enough."""
        seconds = BEATS_MISSED * self.beat_seconds
        log.warning("%s: held by %s; watching for %.0f s", self.path, _named(owner), seconds)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(self.beat_seconds / 4)
            if (now := self._read()) != owner:
                if not now:  # it has just ended well
                    return
                self._refuse(now)

    def _keep(self) -> None:
        while not self.ended.wait(self.beat_seconds):
            if self._read().get("token", self.token) != self.token:
                self.lost = True
                return
            with contextlib.suppress(OSError):  # the next beat may pass
                self._beat()

    def _beat(self) -> None:
        self.beats += 1
        owner = {"host": self.host, "pid": os.getpid(), "token": self.token, "beat": self.beats}
        text = json.dumps(owner).encode().ljust(160) + b"\n"  # one length, so one write replaces it all
        os.pwrite(self.file, text, 0)

    def _read(self) -> dict:
        """The owner in the file; {} when there is none. Opened anew, as network file systems want it."""
        try:
            owner = untrusted.parse(self.path.read_bytes() or b"{}")
        except (OSError, ValueError):
            return {"host": "?", "pid": 0}  # half-written, or gone: someone else's, until it stops changing
        return owner if isinstance(owner, dict) else {"host": "?", "pid": 0}

    def _refuse(self, owner: dict) -> None:
        problem, fix = f"is in use by {_named(owner)}", "Wait for it, or give another workdir."
        raise ConfigError("--workdir", str(self.path.parent), problem, fix)


def _named(owner: dict) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}" if owner else "a run that is just starting"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
