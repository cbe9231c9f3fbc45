"""The lines at the start of a run, the tokenizer beside the weights, and programs kept between starts."""

import os
import shutil

import jax
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from hybridlm import config as configs
from hybridlm import cost, opening, trainer, weights
from hybridlm.convert import families
from hybridlm.errors import ConfigError
from hybridlm.run import programs
from pallas_kernels import Choice
from tests import tiny


def test_six_lines(text, tmp_path, capsys):
    config = configs.resolve(tiny.config(text, train__steps=2))
    trainer.train(config, tmp_path / "run")
    said = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in said[:7]]
    assert names[:6] == ["devices", "kernels", "model", "data", "workdir", "steps"]
    assert said[0].split(maxsplit=1)[1].startswith(f"{jax.device_count()} x ") and "mesh data" in said[0]
    assert "linear_attention" in said[1] and "not hopper" in said[1] and "softmax_attention" in said[1]
    assert "retnet full" in said[2] and "full attention: 1 of 2 layers" in said[2]
    rows = trainer.Member(config, tmp_path, None, None).train_data.num_rows
    assert f"the run reads 256 tokens, {2 * 8 / rows:.3g} epochs; held out: " in said[3]
    assert said[4].endswith("/run") and said[5].endswith("1 to 2, a new run")
    trainer.train(config.replace(train__steps=3), tmp_path / "run")
    assert "3 to 3, resumed at step 2" in capsys.readouterr().out


def test_updates_that_are_looked_at(text, tmp_path, capsys):
    """The weights of a step that may be taken back are there twice: said, and in the estimate."""
    one = {"data": 1, "fsdp": 1, "tensor": 1}
    calm, wild = (configs.resolve(tiny.config(text, train__steps=1, optimizer__b1=b1)) for b1 in (0.9, 0.99))
    more = cost.memory(wild, one).optimizer - cost.memory(calm, one).optimizer
    assert more == 4 * cost.parameters(calm)
    for at, config in (("calm", calm), ("wild", wild)):
        trainer.train(config, tmp_path / at)
        assert ("updates  are looked at" in capsys.readouterr().out) == (config is wild)


def test_tokens_of_a_staged_run_are_those_of_its_stages(text, tmp_path, capsys):
    steps = lambda count, rows: {"train": {"steps": count, "batch_size": rows}}
    stages = {"order": ("a", "b"), "a": steps(2, 2), "b": steps(1, 4)}
    config = tiny.config(text)
    config.stages = stages
    trainer.train(configs.resolve(config), tmp_path / "run")
    assert capsys.readouterr().out.count("the run reads 128 tokens") == 2


@pytest.mark.once
def test_what_cannot_be_said_at_the_start_ends_no_run(text, tmp_path, capsys, monkeypatch, caplog):
    def fail(*_):
        raise KeyError("x")

    config = configs.resolve(tiny.config(text, train__steps=1))
    with monkeypatch.context() as patch:
        patch.setattr(families, "public_format", fail)
        trainer.train(config, tmp_path / "run")
    assert (
        "export   the model was not compared with public formats (KeyError: 'x')" in capsys.readouterr().out
    )
    monkeypatch.setattr(opening, "lines", fail)
    trainer.train(config, tmp_path / "run")
    assert "saying what the run is failed" in caplog.text


@pytest.mark.slow
def test_runs_together_have_the_lines_of_the_first(text, tmp_path, capsys):
    both = [configs.resolve(tiny.config(text, train__steps=1, train__seed=seed)) for seed in (0, 1)]
    trainer.together(both, [tmp_path / "a", tmp_path / "b"])
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("kernels  xla: ") and "not" not in said[1]


@pytest.mark.parametrize(("gpu", "reason", "hint"), [
    (True, "it cannot be imported: no Mosaic", True),
    (True, "the platform is cpu", True),
    (False, "the platform is cpu", False),
])  # fmt: skip
def test_what_to_install_is_said_where_no_kernel_can_run(gpu, reason, hint, monkeypatch):
    monkeypatch.setattr(opening.os.path, "exists", lambda path: gpu)
    said = opening.kernels([Choice("delta", "q", "xla", (("hopper", reason),))])
    assert said.startswith(f"xla: delta; not hopper: {reason}") and (opening.CUDA in said) == hint


def test_kernels_that_run_are_named_once():
    found = [Choice("delta", a, "hopper") for a in "ab"] + [Choice("attention", "q", "cudnn")]
    assert opening.kernels(found) == "hopper: delta; cudnn: attention"


@pytest.mark.once
def test_a_run_stands_on_its_own(text, tmp_path):
    """Its tokenizer is found in the workdir when the file that it was trained with has gone."""
    words = ["state", "gate", "decay", "chunk", "head", "value", "key", "query"]
    file = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "?"])}, unk_token="?"))
    file.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    file.save(str(tmp_path / "elsewhere.json"))
    config = configs.resolve(
        tiny.config(text, train__steps=1, data__tokenizer=str(tmp_path / "elsewhere.json"))
    )
    trainer.train(config, tmp_path / "run")
    (tmp_path / "elsewhere.json").unlink()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    tokens = weights.tokenizer(tmp_path / "moved", configs.of_run(tmp_path / "moved"))
    assert tokens.decode([2, 0]) == "decay state" and tokens.doc_id == 9


@pytest.mark.once
def test_the_tokenizer_of_an_earlier_start_does_not_stay(text, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / weights.TOKENIZER).write_text("{}")
    trainer.train(configs.resolve(tiny.config(text, train__steps=1)), tmp_path / "run")
    assert not (tmp_path / "run" / weights.TOKENIZER).exists()


@pytest.fixture
def cache(monkeypatch):
    """JAX's setting, put back afterwards; and no word of the environment."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_used_longest_ago_go_first(tmp_path):
    for number, name in enumerate(["jax-1-a/old", "jax-2-a/new", "jax-1-a/newer", "other/x"]):
        path = tmp_path / f"{name}-cache"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"1234")
        os.utime(path, (number, number))
    programs.prune(tmp_path, 8)
    assert sorted(path.name for path in tmp_path.rglob("*-cache")) == ["new-cache", "newer-cache", "x-cache"]
    os.utime(tmp_path / "jax-2-a" / "new-cache", (9, 1))  # read since
    programs.prune(tmp_path, 7)
    assert sorted(path.name for path in tmp_path.rglob("*-cache")) == ["new-cache", "x-cache"]


def test_results_of_trials_are_kept_beside_programs(cache, tmp_path):
    """What XLA found fastest for products of these shapes, for programs that differ elsewhere: a default of
    jax, which another may not have."""
    programs.enable(str(tmp_path))
    compiler = pytest.importorskip("jax._src.compiler")
    options = compiler.get_compile_options(1, 1)
    built = options.executable_build_options  # which the next is a part of, and does not keep alive
    assert built.debug_options.xla_gpu_per_fusion_autotune_cache_dir.startswith(f"{tmp_path}/")


def test_where_programs_are_kept(cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = cache()
    programs.enable("")
    assert cache() == before
    programs.enable("auto")
    assert cache().startswith(f"{tmp_path}/hybridlm/jax-{jax.__version__}-")
    programs.enable(str(tmp_path / "other"))
    assert cache() == str(tmp_path / "other") and (tmp_path / "other").is_dir()
    assert programs.said(len(programs.hits)) == f", kept in {tmp_path}/other"
    assert programs.said(-1) == f", read from {tmp_path}/other"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"train.compilation_cache = .*cannot be made"):
        programs.enable(str(tmp_path / "file" / "x"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    programs.enable("auto")
    assert "no compilation cache" in caplog.text and cache() == str(tmp_path / "other")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    programs.enable("auto")
    assert cache() == str(tmp_path / "other")
