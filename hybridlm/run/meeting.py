"""Several processes of one run meet at process 0's address, before JAX is asked to join them.

JAX alone waits for a missing process for minutes, then aborts with a stack dump that blames another. Here
process 0 says who did not come, and the others whether it was there at all; everyone ends with one line.
"""

import contextlib
import json
import os
import secrets
import socket
import time
from typing import Any

from hybridlm import untrusted
from hybridlm.errors import ConfigError

MEET_SECONDS = 300  # that processes wait for each other at the start
HELLO_SECONDS = 5  # that one who has connected may take to say who it is
AGAIN = "Start every process, each with its own index."
HELLO = {"index": untrusted.NATURAL, "count": untrusted.NATURAL, "who": str, "token?": str}
Others = dict[int, tuple[socket.socket, str]]  # by index: the connection, and who it is


def meet(where: str, count: int, index: int) -> None:
    """Returns when all ``count`` processes are here; ConfigError, naming who is missing, after MEET_SECONDS.

    where: HOST:PORT of process 0, which listens there and nowhere else; the port is free again afterwards.
    """
    host, port = where.rsplit(":", 1)
    address = host.strip("[]"), int(port)
    if index:
        _come(where, address, count, index)
    else:
        _open(where, address, count)


def listen(address: tuple[str, int], backlog: int) -> socket.socket:
    """A socket that listens at this address of this machine alone."""
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    return socket.create_server(found[0][4][:2], family=found[0][0], backlog=backlog)


def who() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def say(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it is gone already
        connection.sendall(json.dumps(message).encode() + b"\n")


def hear(connection: socket.socket, seconds: float) -> dict[str, Any]:
    """The line that comes within ``seconds``; ValueError or OSError if none does, or it is no object."""
    connection.settimeout(max(0.01, seconds))
    message = untrusted.parse(connection.makefile("rb").readline(10_000))
    untrusted.check_shape(message, {})
    return dict(message)


def receive(server: socket.socket, count: int, seconds: float, token: str = "") -> tuple[Others, str]:
    """(the others of ``count`` processes, "" or what is wrong with them) at ``server``, within ``seconds``.

    token: of who is heard at all.
    """
    deadline = time.monotonic() + seconds
    here: Others = {}
    problem = ""
    while len(here) < count - 1 and not problem:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection = server.accept()[0]
            hello = hear(connection, min(HELLO_SECONDS, deadline - time.monotonic()))
            untrusted.check_shape(hello, HELLO)
            if not secrets.compare_digest(hello.get("token", "").encode(), token.encode()):
                raise ValueError("another's token")
        except (OSError, ValueError):  # nobody came, or somebody else
            if time.monotonic() >= deadline:
                missing = [one for one in range(1, count) if one not in here]
                problem = f"{_named(missing)} of {count} did not come within {seconds:g} s"
            continue
        problem = _odd(hello, count, here)
        if problem:
            say(connection, {"refused": problem})
        here.setdefault(hello["index"], (connection, hello["who"]))
    return here, problem


def _open(where: str, address: tuple[str, int], count: int) -> None:
    try:
        server = listen(address, count)
    except (OSError, OverflowError, UnicodeError) as error:
        problem = f"process 0 cannot listen there ({error})"
        fix = "HOST:PORT is an address of process 0's own machine, and a free port of it."
        raise ConfigError("--distributed", where, problem, fix) from error
    with server:
        here, problem = receive(server, count, MEET_SECONDS)
    for connection, _ in here.values():
        say(connection, {"refused": problem} if problem else {"go": True})
        connection.close()
    if problem:
        raise ConfigError("--distributed", where, problem, AGAIN)


def _named(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (" ..." if len(indices) > 8 else "")
    return f"process{'es' if len(indices) > 1 else ''} {shown}"


def _odd(hello: dict[str, Any], count: int, here: Others) -> str:
    index, other = hello["index"], f"process {hello['index']} ({hello['who']})"
    if hello["count"] != count:
        return f"{other} counts {hello['count']} processes, and process 0 counts {count}"
    if not 0 < index < count:
        return f"{other} is none of 1 to {count - 1}"
    return f"{here[index][1]} and {hello['who']} both are process {index}" if index in here else ""


def _come(where: str, address: tuple[str, int], count: int, index: int) -> None:
    deadline = time.monotonic() + MEET_SECONDS
    last: Exception = TimeoutError("timed out")
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=min(HELLO_SECONDS, left)) as connection:
                say(connection, {"index": index, "count": count, "who": who()})
                answer = hear(connection, left + HELLO_SECONDS)
            if answer.get("go") is True:
                return
            if isinstance(refused := answer.get("refused"), str):
                raise ConfigError("--distributed", where, refused, AGAIN)
            raise ValueError("another program answers")
        except ConfigError:
            raise
        except (OSError, ValueError, OverflowError) as error:
            last = error
            time.sleep(0.2)
    problem = f"process 0 did not answer there within {MEET_SECONDS:g} s ({last})"
    raise ConfigError("--distributed", where, problem, "Is it started, and reachable from here?")
