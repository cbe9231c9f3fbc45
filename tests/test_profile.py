"""The profiler's window: a table of a run's steps on a CPU, and nothing lost where it fails."""

import re

import jax
import pytest

from hybridlm import config as configs
from hybridlm import trainer
from hybridlm.errors import ConfigError
from hybridlm.run import profile
from tests import tiny


def resolved(text, steps):
    return configs.resolve(tiny.config(text, model__pattern="retnet", train__profile_steps=steps))


@pytest.fixture(scope="module")
def profiled(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    trainer.train(resolved(text, (3, 4)), workdir)
    return workdir


def test_the_table(profiled):
    """Shares add up to one, matrix products are found, and every phase of a step that has any."""
    said = (profiled / "profile" / "steps-3-4.txt").read_text()
    title, *parts = said.split("\n\n")
    assert re.match(r"\d+\.\d{3} ms a step: self time of ops .* host:CPU", title)
    shares = [[float(share) for share in re.findall(r" ([0-9.]+)%  ", part)] for part in parts]
    assert sum(shares[0]) == pytest.approx(100, abs=0.5)
    assert all(one == sorted(one, reverse=True) for one in shares)
    assert {"forward", "backward", "update and others"} <= set(re.findall(r"%  (.*)", parts[0]))
    assert "dot_general" in parts[1] and re.search(r"\d+\.\d x \S+ +jit\(", parts[2])
    assert (profiled / "profile" / "plugins" / "profile" / "steps-3-4" / "local.xplane.pb").stat().st_size


def test_a_profiler_that_fails_costs_no_step(text, profiled, tmp_path, monkeypatch, caplog):
    """A trace that cannot be read, and one that does not begin."""
    broken = lambda *args, **options: (_ for _ in ()).throw(RuntimeError("of the test"))
    monkeypatch.setattr(profile, "read", broken)
    trainer.train(resolved(text, (3, 4)), tmp_path)
    assert tiny.lines(tmp_path) == tiny.lines(profiled)
    monkeypatch.setattr(jax.profiler, "start_trace", broken)
    window = profile.Window(tmp_path, (1, 1))
    window.before(1, ())
    window.after(1, (), None)
    window.close()
    assert caplog.text.count("profiling failed, going on without it: of the test") == 2


def test_self_times():
    """Of nested and of following events, as a stack of calls has them."""
    events = [(0, 100, "while"), (10, 30, "a"), (20, 5, "b"), (40, 60, "c"), (100, 7, "a")]
    assert profile.self_times(events) == [("while", 10), ("a", 25), ("b", 5), ("c", 60), ("a", 7)]


@pytest.mark.parametrize("steps", [(3,), (0, 2), (4, 3), (5, 7), (1, 2, 3)])
def test_what_is_no_window_is_refused(text, steps):
    with pytest.raises(ConfigError, match=r"must be the first and the last step .* in 1 to train.steps = 6"):
        resolved(text, steps)
