"""Datasets of the Hugging Face `datasets` library, from a folder or the hub, as parts for `prepare`."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

from hybridlm import untrusted
from hybridlm.data.documents import Document, Part, record
from hybridlm.errors import ConfigError

FIELD = "--dataset"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """name: a folder (of data files, or one that `save_to_disk` wrote) or a name on the hub.

    config: the dataset's own configuration, "" for its only one.
    split: what to train on.  val_split: what to hold out; "" none.
    """

    name: str
    config: str = ""
    split: str = "train"
    val_split: str = ""


def parts(dataset: Dataset, text_field: str) -> list[Part]:
    """The documents of the dataset, streamed. ConfigError for what `datasets` cannot load, in its words."""
    name, held = os.path.basename(dataset.name.rstrip("/")), dataset.val_split
    sides = [("train", dataset.split), ("val", held)] if held else [("", dataset.split)]
    opened = [(side, split, _open(dataset, split, text_field)) for side, split in sides]
    return [
        Part(0, side, functools.partial(_read, rows, f"{name}/{split}", text_field))
        for side, split, rows in opened
    ]


def _open(dataset: Dataset, split: str, text_field: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        fix = "pip install 'hybridlm[eval]', or give --input files."
        raise ConfigError(FIELD, dataset.name, "needs the package datasets", fix) from error
    path = os.path.expanduser(dataset.name)
    saved = [os.path.join(path, name) for name in ("dataset_dict.json", "state.json")]
    try:
        if any(map(os.path.exists, saved)):
            if dataset.config:
                allowed = f"has no meaning for {dataset.name}, which `save_to_disk` wrote"
                raise ConfigError("--dataset_config", dataset.config, allowed, "Leave it out.")
            rows = datasets.load_from_disk(path)
            if isinstance(rows, datasets.DatasetDict):
                rows = rows[split]
            elif split != Dataset.split or dataset.val_split:
                flag = "--val_split" if dataset.val_split else "--split"
                allowed = f"names no part of {dataset.name}, which was saved without splits"
                raise ConfigError(flag, dataset.val_split or split, allowed, "Leave it out; --holdout cuts.")
        else:
            source = path if os.path.isdir(path) else dataset.name
            rows = datasets.load_dataset(source, dataset.config or None, split=split, streaming=True)
    except ConfigError:
        raise
    except Exception as error:  # of the library, the network, the formats that it reads
        raise _refusal(dataset.name, f"cannot be loaded ({split})", error) from error
    names = rows.column_names  # None where only reading tells
    if names is not None and text_field not in names:
        named = untrusted.terminal(", ".join(names[:20]))
        raise ConfigError("--text_field", text_field, f"is no column of {dataset.name}", f"It has {named}.")
    return rows


def _read(rows: Any, name: str, text_field: str) -> Iterator[Document]:
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            text = row.get(text_field)
            if not isinstance(text, str | None):
                said = f"It holds {type(text).__name__}."
                raise ConfigError("--text_field", text_field, f"is no text in {name}#{number}", said)
            yield record(name, number, text, 0.0)
    except ConfigError:
        raise
    except Exception as error:
        raise _refusal(name, f"cannot be read after record {number}", error) from error


def _refusal(name: str, allowed: str, error: Exception) -> ConfigError:
    said = untrusted.terminal(str(error).strip().partition("\n")[0])[:300].rstrip(".")
    return ConfigError(FIELD, name, allowed, f"{type(error).__name__}: {said}.")
