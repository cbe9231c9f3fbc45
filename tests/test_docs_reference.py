"""The page of config fields names every field that a config has, with its default and what it is."""

import importlib.util
import re
from pathlib import Path

import pytest

from hybridlm import config as configs
from hybridlm import data, kinds, mixers, mlps, objectives, schema

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables() -> dict[str, dict[str, list[str]]]:
    """heading -> field -> its other cells."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, dict[str, list[str]]] = {}
    for line in module.page().splitlines():
        if line.startswith("#"):
            rows = found.setdefault(line.strip("# "), {})
        elif line.startswith("| `"):
            name, *cells = re.split(r" (?<!\\)\| ", line.removeprefix("| ").removesuffix(" |"))
            rows[name.strip("`")] = cells
    return found


def written() -> dict[str, dict]:
    """heading -> field -> default, as configs are filled in."""
    found = {f"`{name}`": configs.default()[name].to_dict() for name in schema.SECTIONS}
    makers = {"Mixer": (mixers, configs.mixer), "MLP": (mlps, configs.mlp)}
    makers |= {"Data": (data, configs.data), "Objective": (objectives, configs.objective)}
    for noun, (room, make) in makers.items():
        for kind in data.KINDS if room is data else kinds.names(room):
            values = make(kind).to_dict()
            assert values.pop("kind") == kind
            found[f"{noun} `{kind}`"] = values
    return found


def test_every_field_is_there_with_its_default(tables):
    for heading, values in written().items():
        assert set(tables[heading]) == set(values), heading
        for name, (_, default, *_) in tables[heading].items():
            assert default.strip("`") in (str(values[name]), repr(values[name])), (heading, name)


def test_every_field_says_what_it_is_and_what_it_accepts(tables):
    """In its docstring as "field: meaning."; see the module's docstring for the form."""
    silent = [(heading, name) for heading, rows in tables.items() for name, row in rows.items() if not row[2]]
    assert not silent
    assert tables["`train`"]["batch_size"][0] == "a whole number, at least 1"
    assert tables["`optimizer`"]["final_ratio"][0] == "a number, at least 0, at most 1"
    assert (
        tables["`model`"]["remat"][0]
        == "one of `none`, `full`, `attention`, `dots`, `mixer`, `kernels`, `most`, `auto`"
    )
    assert tables["Mixer `attention`"]["rotary_fraction"][0] == "a number, above 0, at most 1"
