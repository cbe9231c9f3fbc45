"""Processes that are missing, misplaced or double are named, before JAX is asked."""

import contextlib
import socket
import threading
import time

import pytest

from hybridlm.errors import ConfigError
from hybridlm.run import meeting
from tests.process_runs import free_port


def meet(monkeypatch, given, seconds=1.5):
    """What became of processes that each call meet(port, count, index); "" is well."""
    monkeypatch.setattr(meeting, "MEET_SECONDS", seconds)
    where, said = f"127.0.0.1:{free_port()}", {}

    def one(number, count, index):
        try:
            meeting.meet(where, count, index)
            said[number] = ""
        except ConfigError as error:
            said[number] = str(error)

    threads = [threading.Thread(target=one, args=(number, *rest)) for number, rest in enumerate(given)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return said


def test_all_meet(monkeypatch):
    assert meet(monkeypatch, [(4, 2), (4, 0), (4, 3), (4, 1)], 20) == {0: "", 1: "", 2: "", 3: ""}


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ([(4, 0), (4, 2)], r"processes 1, 3 of 4 did not come within 1.5 s"),
        ([(2, 0)], r"process 1 of 2 did not come within"),
        ([(2, 1)], r"process 0 did not answer there within"),
        ([(2, 0), (3, 1)], r"process 1 \(pid \d+ on .*\) counts 3 processes, and process 0 counts 2"),
        ([(3, 0), (3, 1), (3, 1)], r"pid \d+ on .* both are process 1"),
    ],
)
def test_everyone_hears_who_is_missing_or_odd(monkeypatch, given, part):
    import re

    began = time.monotonic()
    said = meet(monkeypatch, given)
    assert time.monotonic() - began < 15
    assert len(said) == len(given) and said[0]
    assert re.search(part, said[0]) and sum(bool(re.search(part, text)) for text in said.values()) >= 1


def test_what_others_say_is_no_process(monkeypatch):
    """A port scanner, HTTP, another's JSON: closed, and the meeting goes on."""
    monkeypatch.setattr(meeting, "MEET_SECONDS", 20)
    monkeypatch.setattr(meeting, "HELLO_SECONDS", 0.3)
    where = f"127.0.0.1:{free_port()}"
    server = threading.Thread(target=meeting.meet, args=(where, 2, 0))
    server.start()
    time.sleep(0.2)
    port = int(where.split(":")[1])
    for noise in (
        b"GET / HTTP/1.1\r\n",
        b"{}\n",
        b"[" * 9999,
        b'{"index": -1, "count": 2, "who": "x"}\n',
        b"",
    ):
        with socket.create_connection(("127.0.0.1", port)) as one:
            one.sendall(noise)
    meeting.meet(where, 2, 1)
    server.join(10)
    assert not server.is_alive()


def test_process_0_listens_where_it_was_told_and_nowhere_else(monkeypatch):
    with meeting.listen(("127.0.0.1", 0), 1) as server:
        assert server.getsockname()[0] == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"192.0.2.1:9.*process 0 cannot listen there"):
        meeting.meet("192.0.2.1:9", 2, 0)


def test_who_has_no_token_is_not_heard():
    with contextlib.ExitStack() as stack, meeting.listen(("127.0.0.1", 0), 3) as server:
        for token in ("", "guessed", "right"):
            one = stack.enter_context(socket.create_connection(server.getsockname()))
            meeting.say(one, {"index": 1, "count": 2, "who": f"of {token}", "token": token})
        here, problem = meeting.receive(server, 2, 20, "right")
        here[1][0].close()
    assert problem == "" and here[1][1] == "of right"
