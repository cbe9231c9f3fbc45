"""Event files, read back: TensorFlow's records (https://www.tensorflow.org/tutorials/load_data/tfrecord) by a
decoder of their own, the messages by protobuf."""

import errno
import importlib.util
import struct

import pytest
from tensorboardX.proto import event_pb2

from hybridlm import config as configs
from hybridlm import trainer
from hybridlm.errors import ConfigError
from hybridlm.run import logbook, tracking
from tests import tiny
from tests.test_logbook import config, line


def crc32c(data):
    """Castagnoli's polynomial, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(content):
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        data, after = content[12 : 12 + length], content[12 + length : 16 + length]
        assert struct.unpack("<II", content[8:12] + after) == (masked(content[:8]), masked(data))
        yield data
        content = content[16 + length :]


def read(folder):
    """({(step, tag): float or text}, the steps that sessions begin at), of all files in order."""
    values, begins = {}, []
    for path in sorted(folder.iterdir()):
        first, *events = map(event_pb2.Event.FromString, records(path.read_bytes()))
        assert first.file_version == "brain.Event:2"
        for event in events:
            begins += [event.step] * event.HasField("session_log")
            for value in event.summary.value:
                [number] = value.tensor.string_val or [value.simple_value]
                values[event.step, value.tag] = number
    return values, begins


def write(path, steps, start=0, **more):
    with logbook.Logbook(path, config(tensorboard=True), start=start) as book:
        for step in steps:
            book.write(step, line(loss=float(step), **more))


def test_files_have_what_metrics_jsonl_has(tmp_path):
    write(tmp_path, [1, 2, 3], sample="def é", val_loss=None)
    write(tmp_path, [3, 4], start=2)
    values, begins = read(tmp_path / "tensorboard")
    assert begins == [1, 3]  # TensorBoard drops what an earlier file has from there on
    assert values[1, "sample/text_summary"] == "def é".encode()
    numbers = {at: value for at, value in values.items() if isinstance(value, float)}
    records = logbook.read(tmp_path / "metrics.jsonl")
    expected = {(one["step"], name): value for one in records for name, value in one.items()}
    assert numbers == {at: v for at, v in expected.items() if at[1] not in ("step", "sample")}
    assert not any(tag == "val_loss" for _, tag in values)


def test_it_never_fails_the_run(tmp_path, monkeypatch, caplog):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "tensorboard").write_text("a file is in the way")
    write(tmp_path, [1, 2])
    (tmp_path / "tensorboard").unlink()
    for broken in ("write", "flush", "close"):
        with logbook.Logbook(tmp_path, config(tensorboard=True), start=0) as book:
            monkeypatch.setattr(book.trackers[1].writer, broken, full)
            for step in (1, 2, 3):
                book.write(step, line())
        assert len(logbook.read(tmp_path / "metrics.jsonl")) == 3
    assert caplog.text.count("No space left") == 3 and caplog.text.count("did not start") == 1


def test_without_the_extra_it_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    asked = importlib.util.find_spec
    without = lambda name, *more: None if name == "tensorboardX" else asked(name, *more)
    monkeypatch.setattr(importlib.util, "find_spec", without)
    tracking.check_tensorboard(False)
    (tmp_path / "text").mkdir()
    given = configs.resolve(tiny.config(tiny.write_text(tmp_path / "text"), log__tensorboard=True))
    with pytest.raises(ConfigError, match=r"log.tensorboard = True: needs tensorboardX.*\[tensorboard"):
        trainer.train(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()
