"""Several processes as one run: joining, agreeing, and leaving together.

JAX's own service notices a dead process by missed heartbeats and then aborts the others with a stack dump. A
socket from every process to the first notices at once when a process ends, however it does, and says which;
a beat over it notices one that is stopped, and a host that vanished, before JAX does.
"""

import contextlib
import itertools
import json
import logging
import os
import re
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

from hybridlm import untrusted
from hybridlm.errors import ConfigError, RunError
from hybridlm.run import meeting

log = logging.getLogger("hybridlm")

HEARTBEAT_SECONDS = 100  # until JAX gives up a process, which is later than `Peers` does
BEAT_SECONDS, SILENT_SECONDS = 5.0, 60.0  # between signs of life; without one for so long a process is gone
CONNECT_SECONDS = 60
VERDICT_SECONDS = 20  # that a process waits, after a failed collective, to hear who is gone
LEAVE_SECONDS = 5  # that process 0 waits for the others to end first: JAX aborts who is left without it
AGREE_SECONDS = 600  # that a process waits for the others to say what they are about to train
PORT_KEY, SAME_KEY = "hybridlm/peers", "hybridlm/same"
INTACT = "Earlier checkpoints are intact: start all processes again with --resume=auto"

_peers: "Peers | None" = None
_asked = itertools.count()  # how often `same` was, alike in every process


def join(spec: str) -> None:
    """Makes this process one of a run's. Before any device is used; once.

    spec: "auto" for what SLURM, Open MPI, Kubernetes or Cloud TPU say, or "HOST:PORT,COUNT,INDEX" with the
        address of process 0, which the others reach.
    """
    global _peers
    address: dict[str, Any] = {}
    if spec != "auto":
        match = re.fullmatch(r"([^,]+:([0-9]{1,5})),\s*([0-9]{1,9}),\s*([0-9]{1,9})", spec)
        if not match or not 0 < int(match[2]) < 1 << 16 or int(match[4]) >= int(match[3]):
            allowed = "must be auto or HOST:PORT,COUNT,INDEX, with INDEX from 0 to COUNT - 1"
            raise ConfigError("--distributed", spec, allowed)
        where, count, index = match[1], int(match[3]), int(match[4])
        meeting.meet(where, count, index)
        address = {"coordinator_address": where, "num_processes": count, "process_id": index}
        address["coordinator_bind_address"] = where  # JAX alone would listen on every interface
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the trainer
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address["heartbeat_timeout_seconds"] = HEARTBEAT_SECONDS
    address["initialization_timeout"] = meeting.MEET_SECONDS
    try:
        jax.distributed.initialize(**address)
    except (ValueError, RuntimeError) as error:
        raise ConfigError("--distributed", spec, f"the processes did not meet ({error})") from error
    try:
        _peers = Peers() if jax.process_count() > 1 else None
    except (OSError, RuntimeError) as error:
        raise ConfigError("--distributed", spec, f"process 0 cannot be reached ({error})") from error


def first() -> bool:
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(number: int) -> int:
    """The number of process 0, on all of them."""
    return int(multihost_utils.broadcast_one_to_all(np.int64(number)))


def same(what: Mapping[str, str]) -> None:
    """ConfigError, naming the first difference, unless every process gives the same ``what``, name -> value.

    Processes that differ would train a model that none of them describes, or wait for each other for ever.
    """
    if jax.process_count() == 1:
        return
    client, key = _client(), f"{SAME_KEY}/{next(_asked)}"
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(dict(what)))
    given = [_said(client, key, index) for index in range(jax.process_count())]
    for index, other in enumerate(given):
        for name in sorted(given[0].keys() | other.keys()):
            ours, theirs = given[0].get(name, "absent"), other.get(name, "absent")
            if ours != theirs:
                problem = f"is {theirs} in process {index}, and {ours} in process 0"
                raise ConfigError(name, theirs, problem, "Start every process with the same command.")


def _said(client: Any, key: str, index: int) -> dict[str, str]:
    try:
        text = client.blocking_key_value_get(f"{key}/{index}", int(AGREE_SECONDS * 1000))
    except Exception as error:  # whatever JAX raises when nothing comes
        what = f"process {index} has not said within {AGREE_SECONDS} s what it is about to train"
        raise RunError(f"{what}: it is stuck, or still reading its data. {INTACT}.") from error
    return dict(untrusted.parse(text))


def _client() -> Any:
    client = jax._src.distributed.global_state.client
    if client is None:
        raise RunError("the processes of this run have no coordination service")
    return client


def leave(code: int, message: str) -> None:
    """The end of this process with exit code ``code``; the others hear ``message`` if it failed, and end too.

    Does not return then: the orderly end of a distributed program waits for processes that are stuck.
    """
    if _peers is not None:
        _peers.leave(code, message)


def await_verdict() -> None:
    """After an error that the death of another process may explain: time to hear of it, and to end by it."""
    if _peers is not None:
        time.sleep(VERDICT_SECONDS)


class Peers:
    """One socket between process 0 and each other; lines of JSON.

    A hello (`meeting.HELLO`) on joining, {"beat"} at times, {"bye"} before an orderly end, {"end", "code"}
    for the end of all. A socket that closes without "bye" is the death of its process.
    """

    def __init__(self) -> None:
        self.index, self.who = jax.process_index(), meeting.who()
        self.sockets: dict[int, socket.socket] = {}
        self.names: dict[int, str] = {}
        self.heard: dict[int, float] = {}  # when, by the monotonic clock; without those that said bye
        self.listeners: list[threading.Thread] = []
        self.leaving = False
        self.lock, self.sending = threading.Lock(), threading.Lock()
        client, count = _client(), jax.process_count()
        host = str(jax._src.distributed.global_state.coordinator_address).rsplit(":", 1)[0].strip("[]")
        if self.index == 0:
            token = secrets.token_hex(16)  # others may find the port
            with self._server(host) as server:
                client.key_value_set(PORT_KEY, f"{server.getsockname()[1]} {token}")
                others, problem = meeting.receive(server, count, CONNECT_SECONDS, token)
            if problem:
                raise OSError(problem)
            for index, (connection, who) in others.items():
                self._start_listening(index, f" ({who})", connection)
        else:
            port, token = client.blocking_key_value_get(PORT_KEY, CONNECT_SECONDS * 1000).split()
            connection = socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS)
            hello = {"index": self.index, "count": count, "who": self.who, "token": token}
            meeting.say(connection, hello)
            self._start_listening(0, "", connection)
        threading.Thread(target=self._beat, daemon=True).start()

    def _server(self, host: str) -> socket.socket:
        try:
            return meeting.listen((host, 0), jax.process_count())
        except OSError as error:
            log.warning("listening on every interface: %s is no address of this machine (%s)", host, error)
            return socket.create_server(("", 0), backlog=jax.process_count())

    def _start_listening(self, index: int, who: str, connection: socket.socket) -> None:
        connection.settimeout(None)
        self.sockets[index], self.names[index] = connection, f"process {index}{who}"
        self.heard[index] = time.monotonic()
        self.listeners.append(threading.Thread(target=self._listen, args=(index,), daemon=True))
        self.listeners[-1].start()

    def _listen(self, index: int) -> None:
        try:
            for line in self.sockets[index].makefile("rb"):
                self.heard[index] = time.monotonic()
                message = untrusted.parse(line)
                if "bye" in message:
                    del self.heard[index]
                    return
                if "end" in message:
                    self._end(str(message["end"]), int(message["code"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        if not self.leaving:
            self._end(f"{self.names[index]} ended without a word: killed or crashed. {INTACT}.", 1)

    def _beat(self) -> None:
        """Says that this process lives, and ends the run if another has not for SILENT_SECONDS."""
        before = time.monotonic()
        while not self.leaving:
            time.sleep(BEAT_SECONDS)
            now = time.monotonic()
            self._tell({"beat": True})
            late, before = now - before > 3 * BEAT_SECONDS, now
            for index, heard in list(self.heard.items()):
                if late and index in self.heard:  # stopped itself: it cannot judge others
                    self.heard[index] = now
                elif now - heard > SILENT_SECONDS and not self.leaving:
                    silent = f"{self.names[index]} has given no sign of life for {SILENT_SECONDS:g} s"
                    self._end(f"{silent}: stopped, or its host is gone. {INTACT}.", 1)

    def _tell(self, message: dict[str, Any]) -> None:
        with self.sending:  # beats and the end come from several threads
            for connection in self.sockets.values():
                meeting.say(connection, message)

    def _end(self, message: str, code: int) -> None:
        """Tells everyone that this process can reach, and ends: the main thread may hang in a collective."""
        with self.lock:
            with contextlib.suppress(Exception):  # showing it must not keep this process from ending
                print(untrusted.terminal(f"error: {message}", lines=True), file=sys.stderr, flush=True)
            self._exit(code, message if self.index == 0 else "")

    def leave(self, code: int, message: str) -> None:
        """The caller has said ``message`` already; here it is told to the others."""
        if not code or code == 3:  # all of them finish, or stop, at the same step
            self.leaving = True
            self._tell({"bye": True})
            return
        with self.lock:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            self._exit(code, f"process {self.index} ({self.who}): {message}")

    def _exit(self, code: int, message: str) -> None:
        """The end of this process, once the others have heard ``message``, if any."""
        self.leaving = True
        if message:
            self._tell({"end": message, "code": code})
        deadline = time.monotonic() + LEAVE_SECONDS
        for listener in self.listeners if self.index == 0 else ():  # ends with the process it listens to
            if listener is not threading.current_thread():
                listener.join(max(0.0, deadline - time.monotonic()))
        os._exit(code)
