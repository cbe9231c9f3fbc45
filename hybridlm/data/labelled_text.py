"""Data kind "labelled_text": texts with a class each, read byte by byte, the class asked for at the end.

What Long Range Arena (arXiv 2011.04006) calls Text is films' reviews (IMDb) in bytes, two classes, 1K to 4K
of them; nothing of it is shipped here. The file has a line for each text, {"text": "...", "label": 1},
labels counted from 0. A text's first bytes that fit are kept, padding stands before them, and the class is
the target at a mark that ends the row.
"""

import dataclasses
import hashlib
import json
from typing import Annotated

from hybridlm import untrusted
from hybridlm.data import generated, holdout
from hybridlm.data.generated import BLOCK, Examples, Generated, classified, need
from hybridlm.data.source import View
from hybridlm.errors import ConfigError
from hybridlm.fields import Limits

PAD, MARK, CLASSES = 256, 257, 258  # the first class; below them are bytes
LINE = {"text": str, "label": untrusted.NATURAL}
Item = tuple[bytes, int]


@dataclasses.dataclass(frozen=True)
class Config(generated.Config):
    """path: of the file, JSON lines.
    holdout: part of the texts kept for validation, chosen by a hash of each.
    classes: that labels are of.
    train_examples, val_examples: at most, the first of the file; 0 is all.
    """

    path: str = ""
    holdout: Annotated[float, Limits(0.001, 0.999)] = 0.1
    classes: Annotated[int, Limits(2, 1000)] = 2

    def open(self, view: View) -> Generated:
        need(view, "kind", "labelled_text", vocab_size=CLASSES + self.classes)
        return LabelledText(_read(self), view, self)


def _read(config: Config) -> list[Item]:
    if not config.path:
        raise ConfigError("path", "", 'must name a file of lines {"text": "...", "label": 1}')
    items = []
    for number, line in enumerate(untrusted.read_bytes(config.path, "path").splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = untrusted.parse(line)
            untrusted.check_shape(value, LINE)
        except ValueError as error:
            where = f"{config.path}:{number}"
            raise ConfigError("path", where, f"is no text with a label ({error})") from None
        if value["label"] >= config.classes:
            allowed = f"has the label {value['label']}, of {config.classes} classes counted from 0"
            raise ConfigError("path", f"{config.path}:{number}", allowed, "Set data.classes.")
        items.append((value["text"].encode("utf-8", "surrogatepass"), value["label"]))
    return items


class LabelledText(Generated):
    """One text a row."""

    def __init__(self, items: list[Item], view: View, config: Config):
        keys = [hashlib.sha256(text).hexdigest() for text, _ in items]
        held_N = holdout.choose(keys, config.holdout) if len(items) > 1 else []
        chosen = [item for item, held in zip(items, held_N, strict=False) if held == (view.split == "val")]
        most = config.train_examples if view.split == "train" else config.val_examples
        self.items = chosen[: most or None]
        if not self.items:
            raise ConfigError("path", config.path, f"leaves no text for {view.split}", "Two are needed.")
        digest = hashlib.sha256(json.dumps([keys, [label for _, label in items]]).encode()).hexdigest()[:16]
        number = len(self.items)
        sized = dataclasses.replace(config, train_examples=number, val_examples=number)
        name = f"labelled text {digest}, {config.classes} classes"
        super().__init__(None, view, sized, name=name, length=view.seq_len, entropy=(13,))

    def _generate(self, block: int) -> Examples:
        length = self.view.seq_len
        items = self.items[block * BLOCK : (block + 1) * BLOCK]
        made = [(list(text[: length - 1]), label) for text, label in items]
        return classified(made, length, mark=MARK, pad=PAD, first=CLASSES)
