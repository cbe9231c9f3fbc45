"""Loading, overriding and resolving; the refusals are in test_errors.py."""

import dataclasses
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import train
from hybridlm import config as configs
from hybridlm import config_file, fields, mixers, pattern, schema
from hybridlm.errors import ConfigError
from launch import grid

QUICKSTART = "configs/quickstart.py"


def test_default_has_every_field_of_the_schema() -> None:
    config = configs.default()
    for name, section in configs.SECTIONS.items():
        assert config[name].to_dict() == dataclasses.asdict(section())
    kinds = {definition.kind for definition in config.mixers.values()}
    assert kinds == set(mixers.kinds()), "every kind of mixer can be tried from the command line"
    for definition in config.mixers.values():
        assert set(definition) == set(fields.fields(mixers.config_class(definition.kind)))


def test_resolve_completes_and_is_idempotent() -> None:
    partial = ConfigDict(
        {
            "model": {"pattern": "wide kda", "num_layers": 5, "d_model": 384},
            "mixers": {
                "kda": {"kind": "kda"},
                "wide": {"kind": "kda", "num_heads": 2},
                "rest": {"kind": "gla"},
            },
            "data": {"kind": "text", "path": "*.txt"},
        }
    )
    config = configs.resolve(partial)
    assert config.model.num_layers == 5
    assert config.model.mlp_hidden == 1024  # 8/3 * 384, a multiple of 256 already
    assert set(config.mixers) == {"kda", "wide"}, "unused definitions are left out"
    assert (config.mixers["wide"].num_heads, config.mixers["wide"].conv_size) == (2, 4)
    assert config.train.steps == schema.Train().steps
    assert configs.resolve(config) == config == configs.resolve(ConfigDict(config.to_dict()))
    assert hash(config) == hash(configs.resolve(partial))  # what is built from it is built once
    with pytest.raises(AttributeError):
        config.train.steps = 1


def test_pattern_as_written() -> None:
    assert configs.resolve(configs.load(QUICKSTART)).model.num_layers == 4


@pytest.mark.parametrize(("d_model", "hidden"), [(256, 768), (1024, 2816), (2048, 5632)])
def test_mlp_hidden_is_that_of_fla(d_model: int, hidden: int) -> None:
    assert configs.mlp_hidden(d_model) == hidden


OVERRIDES = {
    "model.pattern": ("(gdn*3 full)*2", "(gdn*3 full)*2"),
    "model.tie_embeddings": ("false", False),
    "model.dtype": ("bfloat16", "bfloat16"),
    "optimizer.learning_rate": ("3e-4", 3e-4),
    "optimizer.clip_norm": ("2", 2.0),
    "mixers.gdn.head_dim": ("32", 32),
    "mesh.data": ("-1", -1),
    "data.holdout": ("0.25", 0.25),
    "log.name": ("", ""),
}


def test_overrides() -> None:
    config = configs.resolve(
        configs.load(QUICKSTART, {field: text for field, (text, _) in OVERRIDES.items()})
    )
    for field, (_, expected) in OVERRIDES.items():
        value = config.to_dict()
        for key in field.split("."):
            value = value[key]
        assert (value, type(value)) == (expected, type(expected)), field


def test_override_of_a_kind_takes_its_defaults_whatever_the_order() -> None:
    overrides = {"mixers.kda.head_dim": "32", "mixers.kda.kind": "delta_net", "mixers.new.kind": "gla"}
    config = configs.load(QUICKSTART, overrides | {"data.num_pairs": "4", "data.kind": "mqar"})
    assert config.mixers.kda.to_dict() == configs.mixer("delta_net", head_dim=32).to_dict()
    assert config.mixers.new.to_dict() == configs.mixer("gla").to_dict()
    assert config.data.to_dict() == configs.data("mqar", num_pairs=4).to_dict()


def test_a_colon_may_be_part_of_a_files_name(tmp_path: Path) -> None:
    """Of a config and a sweep, its base, and the workdir that is named by it."""
    file = tmp_path / "12:30" / "a:b.py"
    file.parent.mkdir()
    file.write_text(
        "from hybridlm import config\ndef get_config(width='16'):\n    c = config.default()\n"
        "    c.model.d_model = int(width)\n    c.data.path = 'python-stdlib:'\n    return c\n"
    )
    assert configs.load(str(file)).model.d_model == 16 and configs.load(f"{file}:64").model.d_model == 64
    assert train.default_workdir(f"{file}:64") == Path("runs/a-b-64")
    base = f"{file}:{{size}}"
    runs = grid.runs(grid.Sweep(base, [grid.axis("size", 256, 512)]))
    assert [run.config.model.d_model for run in runs] == [256, 512]
    (tmp_path / "s:1.py").write_text(f"from launch.grid import Sweep\nget_sweep = lambda: Sweep({base!r})\n")
    assert grid.load(f"{tmp_path}/s:1.py").base == base


def test_mixture_of_data() -> None:
    config = configs.default()
    parts = {
        "prose": configs.data("text", path="a.txt"),
        "tokens": {"kind": "shards", "path": "b", "weight": 3},
    }
    config.data = configs.data("mixture", components=parts)
    resolved = configs.resolve(config).data
    assert resolved.components["prose"].weight == 1.0
    assert resolved.components["tokens"].weight == 3.0
    assert resolved.components["prose"].tokenizer == "bytes"
    config.data.components.tokens.weigth = 2.0
    with pytest.raises(ConfigError, match=r"data\.components\.tokens\.weigth.*'weight'"):
        configs.resolve(config)


def test_mixture_on_the_command_line() -> None:
    overrides = {
        "data.kind": "mixture",
        "data.components.a.kind": "text",
        "data.components.a.path": "x",
        "data.components.b.kind": "shards",
        "data.components.b.path": "y",
        "data.components.b.weight": "2",
    }
    data = configs.resolve(configs.load(QUICKSTART, overrides)).data
    assert data.components["a"].path == "x"
    assert (data.components["a"].weight, data.components["b"].weight) == (1.0, 2.0)


def test_json_round_trip(tmp_path: Path) -> None:
    config = configs.resolve(configs.load(QUICKSTART))
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(config))
    assert json.loads(path.read_text())["model"]["pattern"] == "kda*3 full"
    assert configs.resolve(config_file.from_json(path)) == config
    assert configs.resolve(configs.load(str(path), {"train.seed": "3"})).train.seed == 3


def test_a_public_folder_in_place_of_a_run_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"architectures": ["GLA"], "model_type": "gla"}')
    with pytest.raises(ConfigError, match="is of a public checkpoint, not of a run"):
        configs.of_run(tmp_path)
    path.write_text('{"architectures": ["GLA"]}')
    with pytest.raises(ConfigError, match="is not the JSON that it should be"):
        configs.of_run(tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        {"model.num_layers": "3"},  # kda*3 full without its end
        {
            "model.num_layers": "6",
            "model.pattern": "(swa:a swa@a)*2 kda/none full/moe",
            "model.post_norm": "kda,full",
        },
        {"model.num_layers": "5", "model.pattern": "(swa:a swa@a)*2 kda/none full/moe"},
        {"model.pattern": "kda", "model.post_norm": "full,kda"},
        {"model.num_layers": "3", "stages.order": "a", "stages.a.train.steps": "3"},
    ],
)
def test_what_is_written_down_is_read_whatever_layers_are_cut_off(given, tmp_path: Path) -> None:
    """Neither pattern nor norms name mixers or MLPs that no layer has, which are left out."""
    config = configs.resolve(configs.load(QUICKSTART, given))
    whole = pattern.fill(pattern.parse(given.get("model.pattern", "kda*3 full")), config.model.num_layers)
    assert pattern.fill(pattern.parse(config.model.pattern), config.model.num_layers) == whole
    (tmp_path / "config.json").write_text(configs.to_json(config))
    assert configs.of_run(tmp_path) == config


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("def get_config(:", "line 1 with SyntaxError"),
        ("x = 1\n\ndef get_config():\n    return 1 / 0\n", "line 4 with ZeroDivisionError"),
        ("config = 1\n", "no function get_config"),
        ("import sys\n\nsys.exit(3)  # which would mean: stopped, start again\n", "line 3 with SystemExit"),
        ("def get_config():\n    return {}\n", "returned dict, not a ConfigDict"),
        ("def get_config(arg):\n    return arg\n", "missing 1 required positional argument"),
        (
            "from hybridlm.config import mixer\n\ndef get_config():\n    mixer('kda', heads=2)\n",
            "'num_heads'",
        ),
    ],
)
def test_broken_config_file(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        configs.load(str(path))
    assert problem in str(caught.value)


KINDS = {
    int: [
        ("1_000", None),
        ("\uff11\uff12", None),
        ("3", 3),
        ("-3", -3),
        ("3.0", None),
        ("x", None),
        ("", None),
    ],
    float: [("3", 3.0), ("1e-3", 1e-3), ("nan", None), ("inf", None), ("x", None)],
    bool: [("True", True), ("false", False), ("1", None)],
    str: [("", ""), ("1", "1")],
    int | None: [("none", None), ("4", 4)],
    tuple[int, ...]: [("1,2", (1, 2)), ("(3,)", (3,)), ("", ()), ("1,x", None)],
    tuple[str, ...]: [
        ("layers.[0], [ab]*.[01]", ("layers.[0]", "[ab]*.[01]")),
        ("('a[0]', '!b',)", ("a[0]", "!b")),
        ("[a, b]", ("a", "b")),
        (" ( ) ", ()),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_each_type(kind: type) -> None:
    for text, value in KINDS[kind]:
        if value is None and text != "none":
            with pytest.raises(ValueError, match="must be"):
                fields.convert(kind, fields.parse(kind, text))
        else:
            parsed = fields.parse(kind, text)
            assert (parsed, type(parsed)) == (value, type(value))
            assert fields.convert(kind, parsed) == value


def test_a_field_that_moved_is_still_read() -> None:
    old = configs.load(QUICKSTART).to_dict()
    old["train"]["z_loss"] = 1e-4
    assert configs.resolve(ConfigDict(old)).objective.z_loss == 1e-4
    assert configs.resolve(configs.load(QUICKSTART, {"train.z_loss": "0.5"})).objective.z_loss == 0.5


@pytest.mark.parametrize(
    ("field", "text", "problem"),
    [
        ("mesh.tensor", "1" + "0" * 30, "at most"),
        ("mixers.kda.head_dim", str(2**63), "at most"),
        ("model.norm_eps", "1e30", "between 0 and 1"),
        ("mixers.full.rope_theta", "1e308", "must be"),
        ("eval.temperature", "1e308", "must be"),
        ("train.seed", str(2**63), "at most"),
        ("model.pattern", "kda*" + "9" * 5000, "layers"),
    ],
)
def test_numbers_beyond_reason_are_refused(field: str, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.resolve(configs.load(QUICKSTART, {field: text}))
    assert caught.value.field == field and problem in str(caught.value)
