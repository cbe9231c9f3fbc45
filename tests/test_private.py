"""Nothing that a run writes or says tells who ran it, and nothing that it reads is executed."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from hybridlm import config as configs
from hybridlm import config_file
from hybridlm.run import private
from hybridlm.run.checkpoint import Checkpoints
from tests import tiny
from tests.test_checkpoint import record, shapes, state

ROOT = Path(__file__).parents[1]
USER, KEY = "alice-liddell", "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home" / USER
    folder.mkdir(parents=True)
    for name, value in (("HOME", str(folder)), ("USER", USER), ("LOGNAME", USER), ("WANDB_API_KEY", KEY)):
        monkeypatch.setenv(name, value)
    return folder


@pytest.mark.once
def test_home_user_and_key_are_in_no_file_and_no_line(home, tmp_path):
    (home / "text").mkdir()
    tiny.write_text(home / "text")
    shared = tmp_path / "scratch" / USER
    shared.mkdir(parents=True)
    (shared / "held.txt").write_text("held out " * 400)
    config = configs.resolve(tiny.config("python-stdlib:", train__steps=2, checkpoint__every_steps=1))
    (home / "given.json").write_text(configs.to_json(config))
    arguments = [
        f"--config={home}/given.json", f"--workdir={home}/run",
        f"--config.data.path={home}/text/*.txt", f"--config.data.val_path={shared}/*.txt",
    ]  # fmt: skip
    command = [sys.executable, "train.py", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    again = subprocess.run([*command, "--resume=never"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "~/run/checkpoints" in again.stderr
    said = run.stdout + run.stderr + again.stdout + again.stderr
    files = {path: path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()}
    assert len(files) > 20
    for secret in (USER, KEY):
        assert secret not in said
        assert not [path for path, content in files.items() if secret.encode() in content]
    written = json.loads((home / "run" / "config.json").read_text())["data"]
    assert written["path"] == "~/text/*.txt" and written["val_path"].endswith("/scratch/$USER/*.txt")
    back = config_file.from_json(home / "run" / "config.json").data
    assert back.path == f"{home}/text/*.txt" and back.val_path == f"{shared}/*.txt"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("{home}", "~"),
        ("{home}/a, {home}/b", "~/a, ~/b"),
        ("error: {home}/a: gone", "error: ~/a: gone"),
        ("{home}-other/a", "{home}-other/a"),
        ("/data/alice-liddell/x", "/data/$USER/x"),
        ("/data/alice-liddell2/x", "/data/alice-liddell2/x"),
        ("alice-liddell", "alice-liddell"),  # a word, not a place
    ],
)
def test_what_is_hidden(home, text, hidden):
    elsewhere = {"home": "/home/somebody"}
    text, hidden = (
        (one if "-other" not in one else one.format(**elsewhere)).format(home=home) for one in (text, hidden)
    )
    assert private.hide(text) == hidden
    if not text.startswith("error"):
        assert private.reveal(private.hide(text)) == text


def test_reading_a_checkpoint_and_its_config_executes_nothing(tmp_path):
    """By Python's audit events; their hook cannot be removed, so it is switched off."""
    with Checkpoints(tmp_path / "checkpoints") as saves:
        saves.save(1, state(1), record(1))
    (tmp_path / "config.json").write_text(configs.to_json(tiny.config("python-stdlib:")))
    with Checkpoints(tmp_path / "checkpoints") as saves:
        saves.restore(1, shapes(state(0)))  # imports that reading needs are done
    seen, watching = [], [True]

    def hook(event, arguments):
        if watching[0] and event in ("pickle.find_class", "marshal.loads", "os.system", "subprocess.Popen"):
            seen.append((event, arguments))

    sys.addaudithook(hook)
    with Checkpoints(tmp_path / "checkpoints") as saves:
        jax.block_until_ready(saves.restore(1, shapes(state(0))))
        assert saves.record(1) == record(1)
    configs.resolve(config_file.from_json(tmp_path / "config.json"))
    watching[0] = False
    assert not seen
