"""How every command ends: with an exit code and, unless it finished, one line on stderr.

0 done, 1 it could not go on, 2 bad input, 3 stopped as asked with a complete checkpoint, 130 interrupted.
"""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from hybridlm.errors import ConfigError, RunError, Stopped
from hybridlm.run import private, processes, show

NO_DEVICE = "Unable to initialize backend"  # JAX, of a platform that is unknown or has no device


def run(body: Callable[[], int | None], interrupted: str = "") -> int:
    """The exit code: ``body()``'s (None is 0), or that of the exception that ended it.

    interrupted: what to tell a user who pressed Ctrl-C. Only an error of the program shows a traceback.
    """
    code, message = 0, ""
    show.steady()
    ignore_abandoned_writes()
    try:
        code = body() or 0
    except ConfigError as error:
        code, message = 2, f"error: {error}"
    except RunError as error:
        code, message = 1, f"error: {error}"
    except Stopped as stopped:
        code, message = 3, f"{stopped}; start again with --resume=auto"
    except KeyboardInterrupt:
        code, message = 130, ": ".join(filter(None, ["interrupted", interrupted]))
    except Exception as error:
        if NO_DEVICE in str(error):
            code, message = 2, f"error: JAX_PLATFORMS = {os.environ.get('JAX_PLATFORMS', '')!r}: {error}"
        else:
            processes.await_verdict()  # the death of another process of this run may explain it
            say(traceback.format_exc().rstrip("\n"))
            code, message = 1, f"error: {type(error).__name__}: {error}"
    if message:
        say(message)
    processes.leave(code, private.hide(message))
    return code


@contextlib.contextmanager
def stored(workdir: Path, intact: str) -> Iterator[None]:
    """Turns what the disk refuses into a RunError, which says what is intact."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{error.filename or workdir}: {error.strerror or error}. {intact}") from error


def say(text: str) -> None:
    """``text`` on stderr, without what names the user or steers a terminal."""
    print(private.shown(text, lines=True), file=sys.stderr, flush=True)


def ignore_abandoned_writes() -> None:
    """Orbax closes its event loop at the first write that fails; what its others say then is no news."""
    show = sys.unraisablehook
    is_news = lambda unraisable: str(unraisable.exc_value) != "Event loop is closed"
    sys.unraisablehook = lambda unraisable: show(unraisable) if is_news(unraisable) else None
    abandoned = lambda text: "never retrieved" in text and "orbax" in text
    logging.getLogger("asyncio").addFilter(lambda record: not abandoned(record.getMessage()))
