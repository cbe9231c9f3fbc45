"""What others wrote is checked before use, what is written is whole or absent, what is shown is text."""

import io
import json
import os
import subprocess

import matplotlib
import pytest
from rich.console import Console

from hybridlm import untrusted
from hybridlm.errors import ConfigError

matplotlib.use("Agg")


def refused(message, function, *arguments, **named):
    with pytest.raises(ConfigError, match=message) as error:
        function(*arguments, **named)
    assert "\n" not in str(error.value)
    return error.value


def test_read_json_gives_what_json_gives(tmp_path):
    value = {"a": [1, 2.5, None, True, "é ☃ \U0001f600"], "b": {"c": {}}, "d": float("inf")}
    for ascii_ in (True, False):
        (tmp_path / "a.json").write_text(json.dumps(value, ensure_ascii=ascii_))
        assert untrusted.read_json(tmp_path / "a.json", "data.path") == value
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")  # some editors put a mark before UTF-8
    assert untrusted.read_json(tmp_path / "a.json", "data.path") == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[1] 2", "Extra data"),
        (b'"\xff"', "utf-8"),
        (b"[" * 1000 + b"]" * 1000, "nested more than 100 deep"),
        (b'{"a":' * 100_000, "nested more than 100 deep"),
        (b'{"x": 1, "x": 2}', "the name 'x' twice"),
        (b'["\\ud800"]', "half a surrogate pair"),
        (b"9" * 5000, "integer string"),
    ],
)
def test_read_json_names_file_and_fault(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    error = refused(message, untrusted.read_json, tmp_path / "a.json", "--workdir")
    assert (error.field, error.value) == ("--workdir", str(tmp_path / "a.json"))


def test_depth_counts_brackets_outside_of_texts():
    untrusted.check_depth(json.dumps(["[" * 500, '"' + "{" * 500, [[1]] * 300]))
    deep = 1
    for _ in range(untrusted.MAX_DEPTH):
        deep = [deep]
    untrusted.check_depth(json.dumps(deep))
    with pytest.raises(ValueError, match="nested"):
        untrusted.check_depth(json.dumps({"]]]": [deep]}))


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused("is a pipe, not a file", untrusted.read_bytes, tmp_path / "pipe", "--input")
    refused("is a directory, not a file. Name a file in it", untrusted.read_bytes, tmp_path, "--input")
    refused("is a device", untrusted.read_bytes, "/dev/zero", "--input")
    refused("No such file", untrusted.read_bytes, tmp_path / "gone", "--input")
    refused("null byte", untrusted.read_bytes, "a\0b", "--input")
    (tmp_path / "a").write_bytes(b"12345")
    refused("has 5 bytes, more than the 4", untrusted.read_bytes, tmp_path / "a", "--input", limit=4)
    assert untrusted.read_bytes(tmp_path / "a", "--input", limit=5) == b"12345"


SHAPE = {
    "format": str,
    "count": untrusted.NATURAL,
    "rate?": float,
    "parts": [{"name": str}],
    "sizes?": {str: int},
}
SOUND = {"format": "x", "count": 3, "parts": [{"name": "a", "more": []}], "sizes": {"a": 1}, "rate": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"count": -1}, "count must be a count, not -1"),
        ({"count": True}, "count must be a count"),
        ({"count": 1 << 63}, "count must be a count"),
        ({"count": 1.0}, "count must be a count"),
        ({"format": None}, "format must be a text, not null"),
        ({"parts": {}}, "parts must be a list, not an object"),
        ({"parts": [{"name": "a"}, {}]}, r"parts\[1\].name is missing"),
        ({"parts": [3]}, r"parts\[0\] must be an object, not 3"),
        ({"sizes": {"a": "1"}}, "sizes.a must be a whole number, not '1'"),
        ({"rate": "1"}, "rate must be a number"),
    ],
)
def test_shapes(change, message):
    if message is None:
        untrusted.check_shape(SOUND | change, SHAPE)
    else:
        with pytest.raises(ValueError, match=message):
            untrusted.check_shape(SOUND | change, SHAPE)


def test_shapes_of_several_kinds():
    untrusted.check_shape([None, "a"], [(str, type(None))])
    with pytest.raises(ValueError, match=r"\[0\] must be a text or null, not 3"):
        untrusted.check_shape([3], [(str, type(None))])


def test_a_name_from_a_file_stays_in_its_folder(tmp_path):
    folder, secret = tmp_path / "in", tmp_path / "secret"
    (folder / "sub").mkdir(parents=True)
    secret.write_text("x")
    (folder / "own").write_text("y")
    (folder / "link").symlink_to(secret)
    (folder / "kept").symlink_to(folder / "own")
    assert untrusted.inside(folder, "sub/new.txt", "--out") == folder / "sub" / "new.txt"
    assert untrusted.inside(folder, "kept", "--out") == folder / "kept"
    for name in (
        "../secret",
        "sub/../../secret",
        "/etc/passwd",
        "",
        ".",
        "a\0b",
        "a\nb",
        "..\\x",
        None,
        3,
        ["a"],
    ):
        refused("must lie inside this folder", untrusted.inside, folder, name, "--out")
    refused("is a link to a place outside", untrusted.inside, folder, "link", "--out")
    assert untrusted.inside(folder, "link", "--out", links=True) == folder / "link"


def test_links_of_a_hugging_face_cache_are_its_own(tmp_path):
    snapshot, blob = tmp_path / "models--a" / "snapshots" / "abc", tmp_path / "models--a" / "blobs" / "123"
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_text("x")
    (tmp_path / "secret").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "other.json").symlink_to("../../../secret")
    assert untrusted.inside(snapshot, "config.json", "--in").read_text() == "x"
    refused("outside", untrusted.inside, snapshot, "other.json", "--in")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    untrusted.write_json(path, {"a": "é"})
    assert json.loads(path.read_text()) == {"a": "é"}
    with pytest.raises(ValueError, match="Out of range"):
        untrusted.write_json(path, float("nan"))
    for name in ("fsync", "replace"):  # a full disk, and a kill just before the rename
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                untrusted.write_text(path, "other")
    assert json.loads(path.read_text()) == {"a": "é"} and os.listdir(tmp_path) == ["a.json"]


def test_a_write_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (order.append(name), real(*a))[1])
    untrusted.write_text(tmp_path / "a", "x")
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_a_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "theirs").write_text("x")
    (tmp_path / "a").symlink_to(tmp_path / "theirs")
    untrusted.write_text(tmp_path / "a", "mine")
    assert (tmp_path / "theirs").read_text() == "x" and (tmp_path / "a").read_text() == "mine"


NASTY = ["plain", "$(touch x)", "a b", "it's", "", "-n", "a\nb", "`id`", "[/b] [red]x"]
NASTY += ["\x1b[31m", "$_{x$", "\\", "é"]


def test_a_shell_reads_words_back():
    done = subprocess.run(
        ["bash", "-c", "printf '%s\\0' " + untrusted.shell(NASTY)], capture_output=True, check=True
    )
    assert done.stdout.decode().split("\0")[:-1] == NASTY
    with pytest.raises(ValueError, match="NUL"):
        untrusted.shell(["a\0b"])


def test_a_terminal_gets_no_commands():
    text = "a\x1b]0;title\x07\x9b31m\r\x08\u202eb\u2028\ud800é\tc\n"
    shown = untrusted.terminal(text)
    assert shown == r"a\x1b]0;title\x07\x9b31m\r\x08\u202eb\u2028\ud800é\tc\n" and shown.encode()
    assert untrusted.terminal("a\tb\n", lines=True) == "a\tb\n"


@pytest.mark.parametrize("text", NASTY)
def test_markup_and_plots_show_the_text_itself(text, tmp_path):
    out = io.StringIO()
    Console(file=out, width=200).print("[b]" + untrusted.markup(text) + "[/b]", highlight=False)
    assert out.getvalue() == untrusted.terminal(text) + "\n"
    from matplotlib import pyplot

    figure = pyplot.figure()
    figure.suptitle(untrusted.plot(text))
    figure.savefig(tmp_path / "a.png")
    pyplot.close(figure)
