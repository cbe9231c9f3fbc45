"""One process of a sweep: trains the runs of the given folders, then exits. Every launcher starts this.

    python -m launch.worker runs/x/kda_3-1            # one run, as train.py would train it
    python -m launch.worker runs/x/seed0 runs/x/seed1 # together in one program

A folder holds point.json, the run's resolved config. What goes wrong is left there as error.txt, its last
line the reason; what each start ran on is added to machine.json. With --die_with_parent the process ends when
its standard input does: with its parent.
"""

import argparse
import contextlib
import fcntl
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from hybridlm import untrusted
from hybridlm.errors import ConfigError, RunError, Stopped, first_line
from hybridlm.run import cli, private, processes, show
from launch import machine
from launch.state import ERROR, POINT

LOCK = "worker.lock"
LOCK_SECONDS = 60  # a killed sweep's worker may take a moment to go


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--die_with_parent", action="store_true")
    parser.add_argument("--distributed", action="store_true", help="join the processes of a multi-node run")
    parser.add_argument("--sharing", type=int, default=1, metavar="N", help="processes on this device")
    flags = parser.parse_args(argv)
    if flags.die_with_parent:
        threading.Thread(target=_die_with_parent, daemon=True).start()
    show.steady()
    private.plain_log()
    folders = [folder.absolute() for folder in flags.folders]
    if flags.distributed:
        processes.join("auto")
        code = work(folders, flags.sharing)
        processes.leave(code, "")
        return code
    try:
        with contextlib.ExitStack() as held:
            for folder in sorted(folders):
                held.enter_context(lock(folder))
            return work(folders, flags.sharing)
    except OSError as error:  # no room for the notes: nobody can be told but through the log
        cli.say(f"failed: {error.filename}: {error.strerror or error}")
        return 1


def work(folders: list[Path], sharing: int = 1) -> int:
    """Trains the runs; 0: all finished, 1: some failed, each with its error.txt, 3: stopped when asked.

    sharing: processes that have this device.
    """
    import jax

    from eval import in_loop
    from hybridlm import config as configs
    from hybridlm import config_file, trainer

    first = jax.process_index() == 0
    if first:
        for folder in folders:
            (folder / ERROR).unlink(missing_ok=True)
        kind = jax.devices()[0].device_kind
        machine.note(folders, machine.start(kind, jax.__version__, sharing, len(folders)))
    failed: dict[Path, str] = {}
    try:
        resolved = [configs.resolve(config_file.from_json(folder / POINT)) for folder in folders]
        tasks = [in_loop.build(config) for config in resolved]
        members = trainer.together(resolved, folders, "auto", tasks)
        failed = {one.workdir: one.failed for one in members if one.failed}
    except Stopped as stopped:
        cli.say(str(stopped))
        return 3
    except (ConfigError, RunError) as error:
        failed = dict.fromkeys(folders, str(error))
    except Exception as error:
        cli.say(traceback.format_exc())
        failed = dict.fromkeys(folders, f"{type(error).__name__}: {first_line(error)}")
    for folder, why in failed.items():
        cli.say(f"failed: {folder.name}: {why}")
        if first:
            untrusted.write_text(folder / ERROR, private.hide(why.strip()) + "\n")
    return int(bool(failed))


def lock(folder: Path) -> IO[str]:
    """The folder's lock, held while it is open; the system drops it when the process ends, however."""
    file = (folder / LOCK).open("w")
    give_up = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < give_up:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        time.sleep(0.2)
    raise SystemExit(f"{folder} is being trained by another process")


def _die_with_parent() -> None:
    while os.read(0, 4096):  # sys.stdin would be locked by this thread when the interpreter closes it
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
