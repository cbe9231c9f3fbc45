"""Folders and workdirs that come from anywhere: names that lead elsewhere, indices that contradict, full
disks, kills; whose tokenizer an import and an export carry.
"""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers as library

from eval import subject
from hybridlm import config as configs
from hybridlm import config_file, init_from, model, weights
from hybridlm.convert import __main__ as command
from hybridlm.convert import families, incoming, outgoing, tensors, tokens
from hybridlm.data.tokenizer import Tokenizer, load
from hybridlm.errors import ConfigError
from hybridlm.run import checkpoint

pytestmark = pytest.mark.once  # test_convert imports and exports on every Python
GOLDEN = Path(__file__).parent / "golden" / "models" / "fla_deltanet"
WORDS = {"<s>": 0, "one": 1, "two": 2, "three": 3}


def write_tokenizer(path: Path, extra: int = 0) -> library.Tokenizer:
    """Words, with a separator of its own; ``extra`` ids more."""
    vocabulary = WORDS | {f"w{i}": len(WORDS) + i for i in range(extra)} | {"[UNK]": len(WORDS) + extra}
    file = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="[UNK]"))
    file.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    file.add_special_tokens(["<s>"])
    file.save(str(path))
    return file


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "hf"))


def split(hf: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The folder in two shards; their tensors and the index's weight_map."""
    whole = tensors.Folder(hf)
    values = {name: whole.read(name) for name in whole.tensors}
    dtypes = {name: whole.tensors[name].dtype for name in values}
    (hf / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(values))}
    planned = {n: tensors.Planned(files[n], dtypes[n], values[n].shape) for n in values}
    tensors.write(hf, planned, values.__getitem__)
    return values, files


# S2, R3, R18: what an index and a header may say.


def test_a_name_in_a_shard_that_the_index_gives_to_another(hf: Path) -> None:
    values, files = split(hf)
    assert set(tensors.Folder(hf).tensors) == set(values)
    name = next(one for one in files if files[one].startswith("model-00001"))
    (hf / "model-00002-of-00002.safetensors").unlink()
    held = [one for one in files if files[one].startswith("model-00002")]
    planned = {
        n: tensors.Planned("model-00002-of-00002.safetensors", "F32", values[n].shape) for n in [*held, name]
    }
    zeros = lambda n: np.zeros_like(values[n]) if n == name else values[n]
    (hf / tensors.INDEX).unlink()
    tensors.write(hf, planned, zeros)
    (hf / tensors.INDEX).write_text(json.dumps({"weight_map": files}))
    with pytest.raises(ConfigError, match="holds tensors that its index does not give it: " + name):
        tensors.Folder(hf)


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        ({"a": None}, "must be a text, not null"),
        ([], "must be an object"),
        ({"a": "../hf/model.safetensors"}, "must lie inside this folder"),
        ({"a": "/etc/passwd"}, "must lie inside this folder"),
        ({"a": "nowhere.safetensors"}, "are missing"),
        ({"a": "out.safetensors"}, "is a link to a place outside its folder"),
    ],
)
def test_an_index_that_leads_elsewhere(hf: Path, weight_map: object, problem: str) -> None:
    (hf.parent / "secret").write_text("secret")
    (hf / "out.safetensors").symlink_to(hf.parent / "secret")
    (hf / tensors.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match=problem):
        tensors.Folder(hf)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "has no place or shape"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "has no place or shape"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "must be a count"),
        ({"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}, "must be a list"),
        ({"dtype": 7, "shape": [1], "data_offsets": [0, 4]}, "must be a text"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "in 4 bytes"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 10**30]}, "must be a count"),
        ([], "must be an object"),
        (None, "must be an object"),
    ],
)
def test_damaged_headers(tmp_path: Path, entry: object, problem: str) -> None:
    text = json.dumps({"a\x1b[31m": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    with pytest.raises(ConfigError, match=problem) as caught:
        tensors.Folder(tmp_path)
    assert "\x1b" not in str(caught.value)


def test_tensors_names_do_not_reach_the_terminal(hf: Path, capsys: pytest.CaptureFixture) -> None:
    whole = tensors.Folder(hf)
    values = {name: whole.read(name).astype(np.float32) for name in whole.tensors} | {"x\x1b[2J": np.zeros(1)}
    planned = {n: tensors.Planned("model.safetensors", "F32", v.shape) for n, v in values.items()}
    (hf / "model.safetensors").unlink()
    tensors.write(hf, planned, lambda name: values[name].astype(np.float32))
    assert command.main(["import", f"--hf={hf}", f"--workdir={hf.parent / 'run'}"]) == 2
    shown = capsys.readouterr().err
    assert "unknown tensors: x" in shown and "\x1b" not in shown


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_hidden_layers": 10**9}, "must be from 1 to 10,000"),
        ({"vocab_size": 2**40}, "must be"),
        ({"hidden_size": -1}, "must be from 1"),
        ({"attn": 3}, "must be a mapping"),
        ({"attn": {"layers": 3, "num_heads": 2}}, "must list layers"),
        ({"num_heads": [1]}, "must be a whole number"),
        ({"norm_eps": 1e400}, "must be finite"),
        ({"a\x1b[31mb": 1}, "does not know"),
        ({"model_type": ["kda"]}, "must be a text"),
    ],
)
def test_config_json_of_the_wrong_shape(hf: Path, change: dict, problem: str) -> None:
    values = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ConfigError, match=problem) as caught:
        families.read_config(hf)
    assert "\x1b" not in str(caught.value)
    (hf / "config.json").write_text('{"model_type": "kda", "x": ' + "[" * 5000 + "]" * 5000 + "}")
    with pytest.raises(ConfigError, match="nested more than"):
        families.read_config(hf)


# S1, S4: tokenizers.


def test_an_imported_run_reads_with_its_own_tokenizer(hf: Path, tmp_path: Path) -> None:
    """Through eval, with the folder gone and the run moved; exports carry it; init_from brings it along."""
    write_tokenizer(hf / "tokenizer.json")
    content = (hf / "tokenizer.json").read_bytes()
    incoming.import_hf(hf, tmp_path / "run")
    shutil.rmtree(hf)
    (tmp_path / "run").rename(tmp_path / "moved")
    loaded = subject.load(tmp_path / "moved")
    assert loaded.tokenizer is not None and loaded.tokenizer.encode("two one") == [2, 1]
    assert loaded.encode("three") == [0, 3]
    outgoing.export_hf(tmp_path / "moved", tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == content
    outgoing.export_hf(tmp_path / "moved", tmp_path / "anew", model_type="delta_net")
    assert library.Tokenizer.from_file(str(tmp_path / "anew" / "tokenizer.json")).encode("two").ids == [2]
    assert json.loads((tmp_path / "anew" / "config.json").read_text())["eos_token_id"] == 0


def test_an_import_without_a_tokenizer_that_fits(
    hf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes never stand in for it."""
    write_tokenizer(hf / "tokenizer.json", extra=200)
    incoming.import_hf(hf, tmp_path / "run")
    assert "has 205 ids, the model 101" in caplog.text
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        subject.load(tmp_path / "run")
    with pytest.raises(ConfigError, match="has 257 ids, the model 101"):
        subject.load(tmp_path / "run", tokenizer="bytes")


def native(workdir: Path, pattern: str = "kda*3 full", **data: str) -> configs.Config:
    """A run that was never imported, at step 3."""
    config = configs.default()
    config.model.update(pattern=pattern, d_model=32, vocab_size=300, mlp_hidden=16, dtype="float32")
    for mixer in config.mixers.values():
        mixer.update({n: v for n, v in (("num_heads", 2), ("head_dim", 16)) if n in mixer})
    config.data = configs.data("text", path="python-stdlib:", **data)
    resolved = configs.resolve(config)
    shapes = model.canonical_shapes(model.build(resolved))
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=one.shape).astype(np.float32) for name, one in shapes.items()}
    with checkpoint.Checkpoints(workdir / "checkpoints") as saves:
        saves.save(3, {"params": params}, {"format": checkpoint.FORMAT})
    (workdir / "config.json").write_text(configs.to_json(resolved))
    return resolved


def test_a_run_of_our_own_leaves_with_its_tokenizer(tmp_path: Path) -> None:
    """Bytes become a file that gives the same ids; a tokenizer file goes along as it is."""
    native(tmp_path / "run")
    assert outgoing.export_hf(tmp_path / "run", tmp_path / "hf", dtype="BF16") == "kda"
    file = library.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    for text in ("plain, ASCII\n", "Käse \u2014 \U0001f9c0 \t\r\n", "  a  b ", ""):
        assert file.encode(text).ids == list(text.encode())
        assert file.decode(list(text.encode())) == text
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert said["bos_token_id"] == said["eos_token_id"] == 256 == file.token_to_id("<doc>")
    assert said["dtype"] == "bfloat16"
    described = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert described["eos_token"] == "<doc>"
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 256
    write_tokenizer(tmp_path / "words.json")
    native(tmp_path / "words", tokenizer=str(tmp_path / "words.json"))
    outgoing.export_hf(tmp_path / "words", tmp_path / "hf2")
    assert library.Tokenizer.from_file(str(tmp_path / "hf2" / "tokenizer.json")).encode("two one").ids == [
        2,
        1,
    ]
    described = json.loads((tmp_path / "hf2" / "tokenizer_config.json").read_text())
    assert described["bos_token"] == "<s>"


def test_the_imports_tokenizer_does_not_leave_with_a_run_of_another(hf: Path, tmp_path: Path) -> None:
    write_tokenizer(hf / "tokenizer.json")
    incoming.import_hf(hf, tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    other = write_tokenizer(tmp_path / "other.json", extra=3)
    config = config_file.from_json(tmp_path / "run" / "config.json")
    config.data.tokenizer, config.init_from = str(tmp_path / "other.json"), str(hf)
    (tmp_path / "run" / "config.json").write_text(configs.to_json(configs.resolve(config)))
    outgoing.export_hf(tmp_path / "run", tmp_path / "out")
    found = library.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert found.get_vocab() == other.get_vocab()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        GOLDEN / "model.safetensors"
    ).read_bytes()
    (tmp_path / "other.json").unlink()
    outgoing.export_hf(tmp_path / "run", tmp_path / "without")
    assert not (tmp_path / "without" / "tokenizer.json").exists()


def test_byte_level_is_the_bytes_tokenizer() -> None:
    assert tokens.byte_level().get_vocab_size() == 257


# S3: dtypes.


def test_config_says_what_the_tensors_are(hf: Path, tmp_path: Path) -> None:
    incoming.import_hf(hf, tmp_path / "run")
    for dtype, name in (("F16", "float16"), ("F32", "float32"), ("BF16", "bfloat16")):
        outgoing.export_hf(tmp_path / "run", tmp_path / dtype, dtype=dtype)
        assert {one.dtype for one in tensors.Folder(tmp_path / dtype).tensors.values()} == {dtype}
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == name


# R3: a manifest from anywhere.


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"file": "../../x.sh"}, "must lie inside this folder"),
        ({"file": "/tmp/x.safetensors"}, "must lie inside this folder"),
        ({"file": "config.json"}, "must be a .safetensors"),
        ({"file": "a/b.safetensors"}, "must be a .safetensors"),
        ({"dtype": "I8"}, "that the model has not"),
        ({"rule": "nobody"}, "that the model has not"),
        ({"shape": [1]}, "of other shapes"),
        ({"shape": ["1"]}, "must be a count"),
        ("model.norm_weight", "calls the tensor model.norm.weight model.norm_weight, which no import would"),
        (None, "lacks"),
    ],
)
def test_a_manifest_from_anywhere(
    change: dict | str | None, problem: str, imported_once: Path, tmp_path: Path
) -> None:
    workdir = shutil.copytree(imported_once, tmp_path / "run")
    path = workdir / "hf" / "manifest.json"
    manifest = json.loads(path.read_text())
    name = "model.norm.weight"
    if change is None:
        del manifest[name]
    elif isinstance(change, str):  # its new name: every tensor is there, one is called otherwise
        manifest[change] = manifest.pop(name)
    else:
        manifest[name] |= change
    path.write_text(json.dumps(manifest))
    before = sorted(str(one) for one in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=problem):
        outgoing.export_hf(workdir, tmp_path / "out")
    assert sorted(str(one) for one in tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def imported_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("imported") / "run"
    incoming.import_hf(GOLDEN, workdir)
    return workdir


def test_links_do_not_travel(hf: Path, tmp_path: Path, imported_once: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (hf / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match="is a link to a place outside its folder"):
        incoming.import_hf(hf, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    workdir = shutil.copytree(imported_once, tmp_path / "other")
    (workdir / "hf" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match="is a link to a place outside its folder"):
        outgoing.export_hf(workdir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# R17, R22: disks and kills.


def test_an_import_that_ends_anywhere_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The checkpoint gets its name last, so that a kill at any line leaves no model, and the same command
    goes on; so does what a full disk leaves."""
    args = ["import", f"--hf={GOLDEN}", f"--workdir={tmp_path / 'run'}"]
    full = OSError(28, "No space left on device")
    for module, name in (
        (incoming.untrusted, "write_text"),
        (incoming.untrusted, "write_json"),
        (Path, "rename"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *args, **options: (_ for _ in ()).throw(full))
            assert command.main(args) in (1, 2)
            shown = capsys.readouterr().err
            assert "No space left on device" in shown and "Traceback" not in shown
        assert not (tmp_path / "run" / "checkpoints").exists()
    (tmp_path / "run" / incoming.SCRATCH / "0").mkdir(parents=True)  # of a kill
    assert command.main(args) == 0
    assert weights.load(tmp_path / "run").step == 0
    assert not (tmp_path / "run" / incoming.SCRATCH).exists()


def test_an_export_that_ends_anywhere_leaves_nothing(
    imported_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    args = ["export", f"--workdir={imported_once}", f"--hf={tmp_path / 'out'}"]
    full = OSError(28, "No space left on device")
    for module, name in ((outgoing.untrusted, "write_bytes"), (outgoing.tensors.os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *args, **options: (_ for _ in ()).throw(full))
            assert command.main(args) == 2
        shown = capsys.readouterr().err
        assert "No space left on device" in shown and "Traceback" not in shown
        assert not list(tmp_path.iterdir())
    (tmp_path / ".out.exporting").mkdir()  # of a kill
    assert command.main(args) == 0 and [one.name for one in tmp_path.iterdir()] == ["out"]
    assert command.main(args) == 2
    assert "must be a new or empty directory" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(imported_once: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        outgoing.export_hf(imported_once, tmp_path / "out")
    with pytest.raises(ConfigError, match="cannot be written"):
        incoming.import_hf(GOLDEN, tmp_path / "run")


def test_init_from_looks_at_the_tokenizer(hf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tokenizer(hf / "tokenizer.json")
    incoming.import_hf(hf, tmp_path / "run")
    config = configs.of_run(tmp_path / "run")
    assert config.data.tokenizer == str(tmp_path / "run" / "tokenizer.json")  # that of a run from its config
    definition = model.build(config)
    fresh = model.init(definition, jax.random.key(0))
    for place, tokenizer, warned in (
        (hf, Tokenizer(), True),
        (tmp_path / "run", load(config.data.tokenizer), False),
    ):
        (tmp_path / f"next{warned}").mkdir()
        caplog.clear()
        init_from.start(str(place), definition, fresh, tmp_path / f"next{warned}", tokenizer)
        assert ("was learnt with the tokenizer" in caplog.text) == warned
        assert (tmp_path / f"next{warned}" / "hf" / "tokenizer.json").is_file()
        assert not (tmp_path / f"next{warned}" / "tokenizer.json").exists()  # the run's data say which it is


def test_logits_that_cannot_be_made_leave_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "logits.npy"
    out.write_bytes(b"of yesterday")
    for place, wrong in ((out, "--ids = "), (tmp_path, "--out = ")):
        assert command.main(["logits", "--workdir=none", "--ids=none.npy", f"--out={place}"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {wrong}")
    assert out.read_bytes() == b"of yesterday" and list(tmp_path.iterdir()) == [out]
