"""Several processes as one run: joining, agreeing, and leaving together.

JAX's own service notices a dead process by missed heartbeats and then aborts the others with a stack dump. A
socket from every process to the first notices at once when a process ends, however it does, and says which;
the heartbeat stays for hosts that vanish without closing their sockets.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hybridlm.errors import ConfigError, RunError

log = logging.getLogger("hybridlm")

HEARTBEAT_SECONDS = 40  # until a host that vanished is given up
VERDICT_SECONDS = 20  # that a process waits, after a failed collective, to hear who is gone
LEAVE_SECONDS = 5  # that process 0 waits for the others to end first: JAX aborts who is left without it
AGREE_SECONDS = 120  # that a process waits for the others to say what they are about to train
PORT_KEY, SAME_KEY = "hybridlm/peers", "hybridlm/same"
INTACT = "Earlier checkpoints are intact: start all processes again with --resume=auto"

_peers: "Peers | None" = None


def join(spec: str) -> None:
    """Makes this process one of a run's. Before any device is used; once.

    spec: "auto" for what SLURM, Open MPI, Kubernetes or Cloud TPU say, or "HOST:PORT,COUNT,INDEX" with the
        address of process 0, which the others reach.
    """
    global _peers
    address: dict[str, Any] = {}
    if spec != "auto":
        try:
            where, count, index = spec.split(",")
            address = {"coordinator_address": where, "num_processes": int(count), "process_id": int(index)}
            int(where.rsplit(":", 1)[1])
        except (ValueError, IndexError) as error:
            raise ConfigError("--distributed", spec, "must be auto or HOST:PORT,COUNT,INDEX") from error
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the trainer
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**address, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise ConfigError("--distributed", spec, f"the processes did not meet ({error})") from error
    try:
        _peers = Peers() if jax.process_count() > 1 else None
    except OSError as error:
        raise ConfigError("--distributed", spec, f"process 0 cannot be reached ({error})") from error


def first() -> bool:
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(number: int) -> int:
    """The number of process 0, on all of them."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int64(number)))


def same(what: Mapping[str, str]) -> None:
    """ConfigError, naming the first difference, unless every process gives the same ``what``, name -> value.

    Processes that differ would train a model that none of them describes, or wait for each other for ever.
    """
    if jax.process_count() == 1:
        return
    client = _client()
    client.key_value_set(f"{SAME_KEY}/{jax.process_index()}", json.dumps(dict(what)))
    given = [
        json.loads(client.blocking_key_value_get(f"{SAME_KEY}/{index}", AGREE_SECONDS * 1000))
        for index in range(jax.process_count())
    ]
    for index, other in enumerate(given):
        for name in sorted(given[0].keys() | other.keys()):
            ours, theirs = given[0].get(name, "absent"), other.get(name, "absent")
            if ours != theirs:
                problem = f"is {theirs} in process {index}, and {ours} in process 0"
                raise ConfigError(name, theirs, problem, "Start every process with the same command.")


def _client() -> Any:
    client = jax._src.distributed.global_state.client
    if client is None:
        raise RunError("the processes of this run have no coordination service")
    return client


def leave(code: int, message: str) -> None:
    """The end of this process with exit code ``code``; the others hear ``message`` if it failed, and end too.

    Does not return then: the orderly end of a distributed program waits for processes that are stuck.
    """
    if _peers is None:
        return
    if not code or code == 3:  # all of them finish, or stop, at the same step
        _peers.goodbye()
    else:
        _peers.fail(message, code)


def await_verdict() -> None:
    """After an error that the death of another process may explain: time to hear of it, and to end by it."""
    if _peers is not None:
        time.sleep(VERDICT_SECONDS)


class Peers:
    """One socket between process 0 and each other; lines of JSON.

    {"token", "index", "who"} on joining, {"bye"} before an orderly end, {"end", "code"} for the end of all.
    A socket that closes without "bye" is the death of its process.
    """

    def __init__(self) -> None:
        self.index, self.who = jax.process_index(), f"pid {os.getpid()} on {socket.gethostname()}"
        self.sockets: dict[int, socket.socket] = {}
        self.listeners: list[threading.Thread] = []
        self.leaving = False
        self.lock = threading.Lock()
        client = _client()
        coordinator = str(jax._src.distributed.global_state.coordinator_address)
        if self.index == 0:
            token = secrets.token_hex(16)  # others may find the port
            server = socket.create_server(("", 0), backlog=jax.process_count())
            client.key_value_set(PORT_KEY, f"{server.getsockname()[1]} {token}")
            while len(self.sockets) < jax.process_count() - 1:
                self._welcome(server.accept()[0], token)
            server.close()
        else:
            host = coordinator.rsplit(":", 1)[0].strip("[]")
            port, token = client.blocking_key_value_get(PORT_KEY, 60_000).split()
            connection = socket.create_connection((host, int(port)), timeout=60)
            connection.settimeout(None)
            self.sockets[0] = connection
            self._send(0, {"token": token, "index": self.index, "who": self.who})
            self._start_listening(0, "", connection)

    def _welcome(self, connection: socket.socket, token: str) -> None:
        try:
            connection.settimeout(10)
            hello = json.loads(connection.makefile("r").readline(1000))
            if hello["token"] != token:
                raise ValueError("another's token")
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()
            return
        connection.settimeout(None)
        self.sockets[hello["index"]] = connection
        self._start_listening(hello["index"], f" ({hello['who']})", connection)

    def _start_listening(self, *args: Any) -> None:
        self.listeners.append(threading.Thread(target=self._listen, args=args, daemon=True))
        self.listeners[-1].start()

    def _listen(self, index: int, who: str, connection: socket.socket) -> None:
        try:
            for line in connection.makefile("r"):
                message = json.loads(line)
                if "bye" in message:
                    return
                self._end(message["end"], message["code"])
        except OSError:
            pass
        if not self.leaving:
            self._end(f"process {index}{who} ended without a word: killed or crashed. {INTACT}.", 1)

    def _send(self, index: int, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it is gone already
            self.sockets[index].sendall(json.dumps(message).encode() + b"\n")

    def _end(self, message: str, code: int) -> None:
        """Tells everyone that this process can reach, and ends: the main thread may hang in a collective."""
        with self.lock:
            print(f"error: {message}", file=sys.stderr, flush=True)
            self._exit(code, message if self.index == 0 else "")

    def goodbye(self) -> None:
        self.leaving = True
        for index in self.sockets:
            self._send(index, {"bye": True})

    def fail(self, message: str, code: int) -> None:
        """The caller has said ``message`` already; here it is told to the others."""
        with self.lock:
            sys.stdout.flush()
            self._exit(code, f"process {self.index} ({self.who}): {message}")

    def _exit(self, code: int, message: str) -> None:
        """The end of this process, once the others have heard ``message``, if any."""
        self.leaving = True
        for index in self.sockets if message else ():
            self._send(index, {"end": message, "code": code})
        deadline = time.monotonic() + LEAVE_SECONDS
        for listener in self.listeners if self.index == 0 else ():  # ends with the process it listens to
            if listener is not threading.current_thread():
                listener.join(max(0.0, deadline - time.monotonic()))
        os._exit(code)
