"""`python -m hybridlm.generate` on trained and imported runs."""

import io
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from hybridlm import config as configs
from hybridlm import generate, trainer, weights
from hybridlm.convert import incoming, tokens
from hybridlm.generate import chat
from hybridlm.generate.__main__ import Until, main
from tests import tiny

GOLDEN = Path(__file__).parent / "golden" / "models"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    config = configs.resolve(tiny.config(tiny.write_text(folder), train__steps=2, train__seq_len=64))
    trainer.train(config, folder / "run")
    return folder / "run"


def written(capsys, *flags) -> str:
    assert main(list(flags)) == 0
    return capsys.readouterr().out


def test_text_follows_the_prompt_and_repeats_with_its_seed(run, capsys):
    flags = [f"--workdir={run}", "--prompt=state gate", "--max_new_tokens=20", "--temperature=2"]
    text = written(capsys, *flags)
    assert text.startswith("state gate") and len(text) > 14 and text.endswith("\n")
    assert text == written(capsys, *flags) != written(capsys, *flags, "--seed=1")
    assert text == written(capsys, *flags, "--stop=")
    stop = text[12:14]
    assert written(capsys, *flags, f"--stop={stop}") == text[: text.index(stop)] + "\n"
    loaded = weights.load(run)
    tokens = weights.tokenizer(run, loaded.config)
    [at_once] = generate.complete(
        loaded.definition, loaded.params, tokens, [[256, *b"state gate"]], max_new_tokens=20,
        sampling=generate.Sampling(2.0),
    )  # fmt: skip
    from hybridlm import untrusted

    assert text == untrusted.terminal(f"state gate{at_once}", lines=True) + "\n"


def test_what_compiling_says_comes_before_the_text(run, capsys, monkeypatch):
    stream = generate.stream

    def warned(*args, **options):
        for block in stream(*args, **options):
            print("runs on xla")
            yield block

    monkeypatch.setattr(generate, "stream", warned)
    text = written(capsys, f"--workdir={run}", "--prompt=state gate", "--max_new_tokens=4")
    assert text.startswith("runs on xla\nstate gate")


@pytest.mark.once
def test_several_texts(run, capsys):
    flags = [f"--workdir={run}", "--prompt=ke", "--max_new_tokens=8", "--temperature=2", "--checkpoint=2"]
    one, three = written(capsys, *flags), written(capsys, *flags, "-n=3")
    assert three.startswith(f"--- 1\n{one}--- 2\nke") and three.count("---") == 3


def test_interactive(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("state\n\nkey\n"))
    text = written(capsys, f"--workdir={run}", "--interactive", "--max_new_tokens=4", "--temperature=0")
    assert text.count("> ") == 4


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([], "--prompt"),
        (["--prompt=a", "--top_p=0"], "top_p"),
        (["--prompt=a", "--temperature=nan"], "temperature"),
        (["--prompt=a", "--checkpoint=3"], "no checkpoint at step 3: there are checkpoints at steps 2"),
        (["--prompt=a", "-n=0"], "--n = 0"),
        (["--prompt=a", "--seed=-1"], "--seed"),
        (["--prompt=\udcff"], "must be UTF-8"),
        (["--prompt=a", "--max_new_tokens=0"], "--max_new_tokens"),
    ],
)
def test_refusals(run, flags, part, capsys):
    assert main([f"--workdir={run}", *flags]) == 2
    assert part in capsys.readouterr().err


@pytest.mark.once
def test_tokens_that_stand_for_no_text(tmp_path, capsys):
    config = tiny.config("", train__steps=1)
    config.data = configs.data("mqar", num_pairs=2)
    trainer.train(configs.resolve(config), tmp_path)
    assert main([f"--workdir={tmp_path}", "--prompt=a"]) == 2
    assert "stand for no text" in capsys.readouterr().err


def test_until():
    until = Until(["", "end", "dx"])
    assert [until.add(text) for text in ("ab e", "n", "c end", "x")] == ["ab ", "", "enc ", ""]
    assert until.done and until.add("", last=True) == ""
    open_ = Until(["\n\n"])
    assert open_.add("a\n") == "a" and open_.add("", last=True) == "\n"


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}<|im_start|>assistant\n"
)


def chatting(workdir) -> None:
    """A byte-level tokenizer with a chat model's specials, and its template, as an import leaves them."""
    file = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet())}, merges=[]))
    file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    file.decoder = decoders.ByteLevel()
    file.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    (workdir / "hf").mkdir(parents=True)
    file.save(str(workdir / "tokenizer.json"))
    described = {"chat_template": TEMPLATE, "eos_token": {"content": "<|im_end|>"}, "bos_token": None}
    (workdir / "hf" / "tokenizer_config.json").write_text(json.dumps(described))
    (workdir / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))


def alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def test_a_chat_template(tmp_path):
    pytest.importorskip("jinja2", reason="the extra `test` brings jinja2")
    chatting(tmp_path)
    own = weights.tokenizers.load(str(tmp_path / "tokenizer.json"))
    found = chat.find(tmp_path, own)
    ids = found.encode([{"role": "user", "content": "Hi"}])
    assert ids.count(256) == 2 and ids.count(257) == 1  # read as special tokens, not as their letters
    assert own.decode(ids) == "user\nHiassistant"
    assert weights.ends(tmp_path, own) == (257, 258)
    with pytest.raises(configs.ConfigError, match="refuses these messages: no"):
        found.encode([{"role": "system", "content": "Hi"}])


def test_a_chat_template_without_jinja_is_said(tmp_path, monkeypatch):
    chatting(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "jinja2.sandbox", None)
    own = weights.tokenizers.load(str(tmp_path / "tokenizer.json"))
    with pytest.raises(configs.ConfigError, match="pip install jinja2"):
        chat.find(tmp_path, own)
    assert chat.find(tmp_path / "hf", own) is None


@pytest.mark.once
def test_an_imported_model_writes(tmp_path, capsys, caplog):
    """The golden folder of FLA's DeltaNet with a tokenizer of its size beside it, and an end of texts."""
    folder = tmp_path / "public"
    shutil.copytree(GOLDEN / "fla_deltanet", folder)
    words = json.loads((folder / "config.json").read_text())["vocab_size"]
    file = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(words - 1)}, unk_token="w0"))
    file.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    file.save(str(folder / "tokenizer.json"))
    incoming.import_hf(folder, tmp_path / "run")
    assert (
        f"begin with id {words - 1}, which separates documents in tokenizer.json; config.json" in caplog.text
    )
    text = written(capsys, f"--workdir={tmp_path / 'run'}", "--prompt=w3 w5", "--max_new_tokens=4")
    names = text.split()
    assert names[:2] == ["w3", "w5"] and 2 < len(names) <= 6 and all(name[0] == "w" for name in names)
    end = {"eos_token_id": [int(names[2][1:])]}
    (tmp_path / "run" / "hf" / "generation_config.json").write_text(json.dumps(end))
    text = written(capsys, f"--workdir={tmp_path / 'run'}", "--prompt=w3 w5", "--max_new_tokens=4")
    assert text.split() == names[:2]
    other = weights.tokenizers.load(str(folder / "tokenizer.json"))
    other.content += b" "
    assert weights.ends(tmp_path / "run", other) == ()  # another tokenizer's ids mean something else

    config = configs.of_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    tokens.write(tmp_path / "out", weights.tokenizer(tmp_path / "run", config), config)
    named = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert named == {"bos_token_id": words - 1, "eos_token_id": [words - 1, *end["eos_token_id"]]}
