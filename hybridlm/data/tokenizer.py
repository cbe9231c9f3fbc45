"""Text to token ids and back: raw bytes, or any file of the Hugging Face `tokenizers` library."""

import array
import functools
import hashlib
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from hybridlm import untrusted
from hybridlm.errors import ConfigError

logger = logging.getLogger("hybridlm")

MAX_ID = 1 << 24  # above every id of a file; the largest public vocabularies have 2^20 or so
HELD = 8  # tokens that may wait for a character to be complete: the longest has 4 bytes
CONTEXT = 64  # tokens before a new one that can change its text
BATCH = 1 << 24  # characters that the library is given at once: it needs about 110 bytes for each
PIECE = 1 << 20  # characters after which a long text is cut, where that changes no token
MAX_TEXT = 1 << 28  # characters of a text that cannot be cut
NO_FILE = "is not a Hugging Face `tokenizers` file"

# Special tokens that published tokenizers put between documents, in order of preference.
SEPARATORS = (
    "<doc>",
    "<|begin_of_text|>",
    "<bos>",
    "<s>",
    "[BOS]",
    "<｜begin▁of▁sentence｜>",
    "<beginning_of_sentence>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "</s>",
)

_PLACE = re.compile("[A-Za-z](?=[ \n])")  # where a long text may be cut


class Tokenizer:
    """Bytes as tokens: ids 0..255 are the bytes and 256 is the separator ``<doc>``.

    doc_id: the id that stands before every document and is the target of its last token.
    ends: ids after which a text is complete: doc_id, and what a public model has besides (`weights.ends`).
    pieces: the bytes that each id stands for, b"" for special ids; None where ids have no fixed bytes.
    replaced: documents so far whose invalid UTF-8 was replaced by U+FFFD (never for bytes: they are kept).
    """

    name = "bytes"
    fingerprint = "bytes"
    vocab_size = 257
    doc_id = 256
    replaced = 0
    more_ends: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.pieces: list[bytes] | None = [bytes([byte]) for byte in range(256)] + [b""]

    @property
    def ends(self) -> tuple[int, ...]:
        return self.doc_id, *self.more_ends

    @property
    def token_bytes(self) -> np.ndarray | None:
        """Bytes that each id stands for, int32 [vocab_size]."""
        return None if self.pieces is None else np.array([len(piece) for piece in self.pieces], np.int32)

    @property
    def dtype(self) -> np.dtype:
        """The smallest of little-endian uint16 and uint32 that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without a separator."""
        return list(text.encode())

    def count(self, text: str) -> int:
        """How many ids `encode` makes of ``text``; other threads run meanwhile."""
        return len(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; ids that stand for no text are left out, broken UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")

    def decode_after(self, prompt: Sequence[int], ids: Iterable[int]) -> str:
        """What ``ids`` add to the text of ``prompt``: decode(prompt + ids) is what is shown.

        That is not decode(ids) where a token's text depends on what stands before it: Llama's decoder drops
        a space at the start of a text, and a character's bytes may lie in several tokens.
        """
        before, whole = self.decode(prompt), self.decode([*prompt, *ids])
        return _behind(before, whole)

    def stream(self, prompt: Sequence[int] = ()) -> "Stream":
        """Decodes what follows ``prompt`` token by token."""
        return Stream(self, prompt)

    def documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Each text as separator + tokens, in ``dtype``."""
        separator = np.array([self.doc_id], self.dtype)
        return [
            np.concatenate([separator, np.frombuffer(text, np.uint8)], dtype=self.dtype) for text in texts
        ]


class FileTokenizer(Tokenizer):
    """A `tokenizers` JSON file, used as it is but for what would change a training text silently.

    Padding, truncation, dropout of merges and automatic special tokens are off, and special tokens spelt out
    in a text are read as the plain text that they are. The separator is the file's own (see SEPARATORS) or,
    if it has none, one id added past its vocabulary.
    """

    def __init__(self, path: str, field: str = "tokenizer"):
        self.name, self.refused = path, functools.partial(ConfigError, field, path)
        self.content, described = self._content()
        with self._library(NO_FILE, "It was refused with: "):
            self.file = tokenizers.Tokenizer.from_buffer(self.content)
        with self._library("cannot be set up"):
            whole(self.file)
            self.file.encode_special_tokens = True
            vocabulary = self.file.get_vocab(with_added_tokens=True)
            added = self.file.get_added_tokens_decoder()
        self.fingerprint = hashlib.sha256(self.content).hexdigest()
        special = {token.content: i for i, token in added.items() if token.special}
        size = max(vocabulary.values(), default=-1) + 1
        if size > MAX_ID:
            raise self.refused(f"has an id of {size - 1:,}, must be below {MAX_ID:,}")
        self.doc_id = next((special[name] for name in SEPARATORS if name in special), size)
        self.vocab_size = max(size, self.doc_id + 1)
        self.pieces = self._pieces(vocabulary, _kinds(described.get("decoder"), "decoders"))
        before = _kinds(described.get("pre_tokenizer"), "pretokenizers")
        self.cuts = "ByteLevel" in before and described.get("normalizer") is None

    def _content(self) -> tuple[bytes, dict[str, Any]]:
        """The file and what it says, looked at before the library is: an id of 4e9 would be an abort."""
        try:
            content = untrusted.read_bytes(Path(self.name).expanduser(), "tokenizer")
        except ConfigError as error:
            problem = f'must be "bytes" or a readable tokenizer.json; it {error.allowed}'
            raise self.refused(problem, error.fix) from error
        try:
            value = untrusted.parse(content)
            untrusted.check_shape(value, {"model": dict, "added_tokens?": ([dict], type(None))})
            ids = [token.get("id") for token in value.get("added_tokens") or ()]
            if isinstance(vocabulary := value["model"].get("vocab"), dict):
                ids += vocabulary.values()
            _check_merges(value["model"])
        except ValueError as error:
            raise self.refused(NO_FILE, f"It was refused with: {error}.") from error
        largest = max((i for i in ids if isinstance(i, int | float)), default=0)
        if largest >= MAX_ID:
            raise self.refused(f"has an id of {largest:,}, must be below {MAX_ID:,}")
        return content, value

    def _pieces(self, vocabulary: dict[str, int], kinds: set[str]) -> list[bytes] | None:
        if "ByteLevel" in kinds:
            read = _byte_level_bytes
        elif kinds & {"Metaspace", "ByteFallback"}:
            read = _sentencepiece_bytes
        else:
            logger.warning(
                "tokenizer %s: no bits per byte, since its decoder (%s) gives a token no fixed bytes",
                self.name, ", ".join(sorted(kinds)) or "none",
            )  # fmt: skip
            return None
        added = self.file.get_added_tokens_decoder()
        pieces = [b""] * self.vocab_size
        for token, i in vocabulary.items():
            if i not in added:
                pieces[i] = read(token)
            elif not added[i].special:
                pieces[i] = token.encode()
        return pieces

    def encode(self, text: str) -> list[int]:
        return self._encoding(text).ids

    def count(self, text: str) -> int:
        return len(self._encoding(text))

    def _encoding(self, text: str) -> tokenizers.Encoding:
        """Of a batch of one: other threads run meanwhile, and where in the text tokens stand is left out."""
        with self._library(f"cannot encode {text[:40]!r}"):
            return self.file.encode_batch_fast([text], add_special_tokens=False)[0]

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in ids if 0 <= i < self.vocab_size]
        with self._library("cannot decode its own ids"):
            return self.file.decode(known, skip_special_tokens=True)

    def documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """ConfigError, which quotes the text, for one that the library cannot encode."""
        parts = [[np.array([self.doc_id], self.dtype)] for _ in texts]
        batch: list[tuple[int, str]] = []
        held = 0
        for number, text in enumerate(texts):
            for piece in self._cut(self._read(text)):
                if batch and held + len(piece) > BATCH:
                    self._encode(batch, parts)
                    batch, held = [], 0
                batch.append((number, piece))
                held += len(piece)
        self._encode(batch, parts)
        return [np.concatenate(part) for part in parts]

    def _encode(self, batch: list[tuple[int, str]], parts: list[list[np.ndarray]]) -> None:
        """Adds the ids of each numbered piece to those of its text."""
        pieces = [piece for _, piece in batch]
        try:
            # The fast way leaves out only where in the text each token stands.
            encodings = self.file.encode_batch_fast(pieces, add_special_tokens=False)
        except BaseException as error:
            if not _of_library(error):
                raise
            for piece in pieces:
                self.encode(piece)  # raises for the text at fault
            raise self.refused(f"cannot encode: {_line(error)}") from error
        for (number, _), encoding in zip(batch, encodings, strict=True):
            ids = np.frombuffer(array.array("I", encoding.ids), np.uint32)  # NumPy is slow with lists
            parts[number].append(ids.astype(self.dtype))

    def _cut(self, text: str) -> list[str]:
        """``text`` in pieces whose tokens are those of the whole, or the whole.

        A text of 30 MB would take one core and 4 GB. Byte-level tokenizers cut a text themselves where a
        letter is followed by white space, and no token spans that; this is tried at each place.
        """
        pieces, start = [], 0
        while self.cuts and len(text) - start > PIECE:
            places = itertools.islice(_PLACE.finditer(text, start + PIECE, start + 2 * PIECE), 16)
            at = next((match.end() for match in places if self._is_boundary(text, match.end())), None)
            if at is None:
                break
            pieces.append(text[start:at])
            start = at
        if len(text) - start > MAX_TEXT:
            allowed = f"cannot encode a document of {len(text):,} characters, at most {MAX_TEXT:,}"
            fix = "Cut it into several, for example with one record a document (.jsonl)."
            raise self.refused(allowed, fix)
        return [*pieces, text[start:]]

    def _is_boundary(self, text: str, at: int) -> bool:
        before, after = text[at - 256 : at], text[at : at + 256]
        return self.encode(before + after) == self.encode(before) + self.encode(after)

    @contextmanager
    def _library(self, problem: str, before: str = "") -> Iterator[None]:
        """Whatever the library raises is one line that says what it could not do."""
        try:
            yield
        except BaseException as error:  # it raises bare Exception, and panics of its own
            if not _of_library(error):
                raise
            raise self.refused(problem, f"{before}{_line(error)}.") from error

    def _read(self, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            self.replaced += 1
            return text.decode(errors="replace")


class Stream:
    """Text of tokens as they come: all that `add` and `end` gave is ``Tokenizer.decode_after(prompt, ids)``.

    Bytes of a character are held back until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self.tokenizer, self.ids = tokenizer, [*prompt]
        self.shown, self.start, self.held = tokenizer.decode(prompt), 0, 0

    def add(self, token: int) -> str:
        """The text that is certain now and was not before; often ""."""
        self.ids.append(token)
        text = self._text()
        self.held += 1
        if text.endswith("\ufffd") and self.held < HELD:
            return ""
        return self._show(text)

    def end(self) -> str:
        """What was held back, broken characters as U+FFFD."""
        return self._show(self._text())

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids[self.start :])

    def _show(self, text: str) -> str:
        new = _behind(self.shown, text)
        self.shown, self.held = text, 0
        if len(self.ids) - self.start > 2 * CONTEXT:
            # Long texts are not decoded from their start each time: CONTEXT tokens stand for what was before.
            self.start = len(self.ids) - CONTEXT
            self.shown = self._text()
        return new


def load(name: str, field: str = "tokenizer") -> Tokenizer:
    """The tokenizer called "bytes", or the one in the file ``name``.

    ConfigError for ``field`` if there is no such file, or, later, where it fails.
    """
    return Tokenizer() if name == "bytes" else FileTokenizer(name, field)


def whole(file: tokenizers.Tokenizer) -> None:
    """Turns off what makes something else of a text than its tokens."""
    file.no_padding()
    file.no_truncation()
    if getattr(file.model, "dropout", None):
        file.model.dropout = None  # of merges, at random: no text would be read twice alike


def report(tokenizer: Tokenizer, text_bytes: int, token_bytes: int) -> None:
    """Logs what was changed in texts of ``text_bytes`` bytes whose tokens stand for ``token_bytes`` bytes."""
    if tokenizer.replaced:
        logger.warning(
            "tokenizer %s: replaced invalid UTF-8 in %d documents", tokenizer.name, tokenizer.replaced
        )
    if tokenizer.pieces is not None and token_bytes != text_bytes:
        logger.warning(
            "tokenizer %s is not lossless here: its tokens stand for %d bytes where the text has %d, "
            "and bits per byte count the former",
            tokenizer.name, token_bytes, text_bytes,
        )  # fmt: skip


def _behind(before: str, whole: str) -> str:
    """``whole`` without what it and ``before`` begin with."""
    if whole.startswith(before):
        return whole[len(before) :]
    pairs = zip(before, whole, strict=False)
    return whole[next((i for i, (a, b) in enumerate(pairs) if a != b), len(whole)) :]


def _check_merges(described: dict[str, Any]) -> None:
    """ValueError for merges whose second part is no continuation: the library cuts its prefix off unseen, and
    aborts the process where it is shorter."""
    prefix, merges = described.get("continuing_subword_prefix"), described.get("merges")
    if not (isinstance(prefix, str) and prefix and isinstance(merges, list)):
        return
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(parts, list) and len(parts) == 2 and not str(parts[1]).startswith(prefix):
            raise ValueError(
                f"a merge to {parts[1]!r}, which has not the continuing_subword_prefix {prefix!r}"
            )


def _of_library(error: BaseException) -> bool:
    """Whether `tokenizers` raised it; a panic of its Rust code is no Exception, nor is Ctrl-C."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _line(error: BaseException) -> str:
    return untrusted.terminal(str(error).strip().partition("\n")[0])[:200].rstrip(".")


def _kinds(part: Any, parts: str) -> set[str]:
    """Names of a part of a tokenizer and of all that it is made of."""
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))}.union(*(_kinds(one, parts) for one in part.get(parts, ())))


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level vocabularies write a byte as its own character if printable, else as chr(256 + its rank)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = {chr(256 + rank): byte for rank, byte in enumerate(b for b in range(256) if b not in printable)}
    return moved | {chr(byte): byte for byte in printable}


def _byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; one with another character in it stands for itself, as in the library."""
    table = _byte_of_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    """Bytes of a SentencePiece token: ``<0x0A>`` is one byte, ``▁`` a space."""
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
