"""A command of ours that is killed at its nth change of a folder, which it then names on stderr:

    python -m tests.chaos.strike N SECONDS FOLDER MODULE [ARGUMENT ...]

A change is what Python opens to write, makes, renames or removes below FOLDER. The kill comes SECONDS after
it: those that tensorstore writes in threads of its own fall there. N = 0 kills nothing, and tells the number.
"""

import os
import re
import runpy
import signal
import sys
import threading
from typing import Any

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MARK = re.compile(r"^struck at change \d+: (.*)$", re.MULTILINE)


def main(number: int, seconds: float, folder: str) -> None:
    seen, kill = [0], lambda: os.kill(os.getpid(), signal.SIGKILL)

    def changed(event: str, given: tuple[Any, ...]) -> None:
        if event not in CHANGES and not (event == "open" and given[2] & WRITING):
            return
        path = given[0] if isinstance(given[0], str | bytes | os.PathLike) else ""
        name = os.fsdecode(path)
        if not name.startswith(folder):
            return
        seen[0] += 1
        if seen[0] == number:
            what = re.sub(r"\d+", "N", f"{event} {os.path.relpath(name, folder)}")
            os.write(2, f"\nstruck at change {number}: {what}, {seconds:.1f} s on\n".encode())
            threading.Timer(seconds, kill).start() if seconds else kill()

    sys.addaudithook(changed)
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        os.write(2, f"\n{seen[0]} changes\n".encode())


if __name__ == "__main__":
    number, seconds, folder = sys.argv[1:4]
    sys.argv = sys.argv[4:]
    main(int(number), float(seconds), folder)
