"""Text to token ids and back: raw bytes, or any file of the Hugging Face `tokenizers` library."""

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from hybridlm.errors import ConfigError

logger = logging.getLogger("hybridlm")

# Special tokens that published tokenizers put between documents, in order of preference.
SEPARATORS = (
    "<doc>",
    "<|begin_of_text|>",
    "<bos>",
    "<s>",
    "[BOS]",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "</s>",
)


class Tokenizer:
    """Bytes as tokens: ids 0..255 are the bytes and 256 is the separator ``<doc>``.

    doc_id: the id that stands before every document and is the target of its last token.
    pieces: the bytes that each id stands for, b"" for special ids; None where ids have no fixed bytes.
    replaced: documents so far whose invalid UTF-8 was replaced by U+FFFD (never for bytes: they are kept).
    """

    name = "bytes"
    fingerprint = "bytes"
    vocab_size = 257
    doc_id = 256
    replaced = 0

    def __init__(self) -> None:
        self.pieces: list[bytes] | None = [bytes([byte]) for byte in range(256)] + [b""]

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

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; ids that stand for no text are left out, broken UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Each text as separator + tokens, in ``dtype``."""
        separator = np.array([self.doc_id], self.dtype)
        return [
            np.concatenate([separator, np.frombuffer(text, np.uint8)], dtype=self.dtype) for text in texts
        ]


class FileTokenizer(Tokenizer):
    """A `tokenizers` JSON file, used as it is but for what would change a training text silently.

    Padding, truncation and automatic special tokens are off, and special tokens spelt out in a text are read
    as the plain text that they are. The separator is the file's own (see SEPARATORS) or, if it has none, one
    id added past its vocabulary.
    """

    def __init__(self, path: str):
        try:
            content = Path(path).expanduser().read_bytes()
            self.file = tokenizers.Tokenizer.from_buffer(content)
        except OSError as error:
            raise ConfigError(
                "tokenizer", path, 'must be "bytes" or a readable tokenizer.json', f"{error.strerror}."
            ) from error
        except Exception as error:  # the library raises bare Exception for a file it cannot parse
            raise ConfigError(
                "tokenizer", path, "is not a Hugging Face `tokenizers` file", f"It was refused with: {error}."
            ) from error
        self.file.no_padding()
        self.file.no_truncation()
        self.file.encode_special_tokens = True
        self.name = path
        self.fingerprint = hashlib.sha256(content).hexdigest()
        vocabulary = self.file.get_vocab(with_added_tokens=True)
        special = {
            token.content: i for i, token in self.file.get_added_tokens_decoder().items() if token.special
        }
        size = max(vocabulary.values(), default=-1) + 1
        self.doc_id = next((special[name] for name in SEPARATORS if name in special), size)
        self.vocab_size = max(size, self.doc_id + 1)
        self.pieces = self._pieces(vocabulary)

    def _pieces(self, vocabulary: dict[str, int]) -> list[bytes] | None:
        kinds = _decoder_kinds(json.loads(self.file.to_str())["decoder"])
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
        return self.file.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.file.decode([i for i in ids if i < self.vocab_size], skip_special_tokens=True)

    def documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        encodings = self.file.encode_batch([self._read(text) for text in texts], add_special_tokens=False)
        return [np.array([self.doc_id, *encoding.ids], self.dtype) for encoding in encodings]

    def _read(self, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            self.replaced += 1
            return text.decode(errors="replace")


def load(name: str) -> Tokenizer:
    """The tokenizer called "bytes", or the one in the file ``name``; ConfigError if there is no such file."""
    return Tokenizer() if name == "bytes" else FileTokenizer(name)


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


def _decoder_kinds(decoder: dict | None) -> set[str]:
    """Names of a decoder and of all that it is made of."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_kinds(part) for part in decoder.get("decoders", ())))


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level vocabularies write a byte as its own character if printable, else as chr(256 + its rank)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = {chr(256 + rank): byte for rank, byte in enumerate(b for b in range(256) if b not in printable)}
    return moved | {chr(byte): byte for byte in printable}


def _byte_level_bytes(token: str) -> bytes:
    return bytes(_byte_of_character()[character] for character in token)


def _sentencepiece_bytes(token: str) -> bytes:
    """Bytes of a SentencePiece token: ``<0x0A>`` is one byte, ``▁`` a space."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
