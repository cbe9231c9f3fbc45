import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from hybridlm.data import tokenizer
from hybridlm.errors import ConfigError

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "naïve café — ☃ \U0001f600\n",
    " leading",
    "<s> not special </s>",
    "a\tb  c",
]


def train(path, *, decoder, pre_tokenizer, model=None, special=(), **extra):
    """Trains a tiny tokenizer on TEXTS and saves it; returns the path."""
    file = tokenizers.Tokenizer(model or models.BPE(byte_fallback=False))
    file.pre_tokenizer, file.decoder = pre_tokenizer, decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(decoder, decoders.ByteLevel) else []
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=list(special), initial_alphabet=alphabet)
    if model is None:
        file.train_from_iterator(TEXTS * 3, trainer)
    for name, value in extra.items():
        setattr(file, name, value)
    file.save(str(path))
    return str(path)


@pytest.fixture
def byte_level(tmp_path):
    return train(
        tmp_path / "tokenizer.json",
        decoder=decoders.ByteLevel(),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        special=("<s>", "</s>"),
        post_processor=processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        ),
    )


def test_bytes_round_trip_and_cost():
    bytes_ = tokenizer.load("bytes")
    assert (bytes_.vocab_size, bytes_.doc_id, bytes_.dtype) == (257, 256, np.dtype("<u2"))
    for text in TEXTS:
        assert bytes_.decode(bytes_.encode(text)) == text
        assert bytes_.encode(text) == list(text.encode())
    assert bytes_.token_bytes.tolist() == [1] * 256 + [0]
    assert bytes_.decode([256, 104, 105, 300, 0xFF]) == "hi�"
    [document] = bytes_.documents([b"\xff\x00a"])  # invalid UTF-8 is kept
    assert document.tolist() == [256, 255, 0, 97] and document.dtype == np.dtype("<u2")


def test_byte_level_file_is_lossless(byte_level):
    file = tokenizer.load(byte_level)
    assert file.doc_id == 0  # its own <s>, of which automatic ones and ones spelt in the text make no second
    for text, document in zip(TEXTS, file.documents([text.encode() for text in TEXTS]), strict=True):
        assert document[0] == 0 and not (document[1:] <= 1).any()
        assert document[1:].tolist() == file.encode(text)
        assert file.decode(document) == text
        assert b"".join(file.pieces[i] for i in document) == text.encode()
        assert file.token_bytes[document].sum() == len(text.encode())


def test_invalid_utf8_is_replaced_and_counted(byte_level):
    file = tokenizer.load(byte_level)
    documents = file.documents([b"ok", b"a\xffb", b"\xfe"])
    assert [file.decode(document) for document in documents] == ["ok", "a�b", "�"]
    assert file.replaced == 2


def test_padding_and_truncation_of_the_file_are_off(tmp_path, byte_level):
    spec = tokenizers.Tokenizer.from_file(byte_level)
    spec.enable_truncation(2)
    spec.enable_padding(length=50)
    spec.save(str(tmp_path / "padded.json"))
    text = TEXTS[0] * 20
    assert tokenizer.load(str(tmp_path / "padded.json")).encode(text) == tokenizer.load(byte_level).encode(
        text
    )


def test_a_file_without_separator_gets_one_past_its_vocabulary(tmp_path):
    path = train(
        tmp_path / "t.json",
        decoder=decoders.ByteLevel(),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    file, size = tokenizer.load(path), tokenizers.Tokenizer.from_file(path).get_vocab_size()
    assert (file.doc_id, file.vocab_size) == (size, size + 1)
    assert file.token_bytes.shape == (size + 1,) and file.token_bytes[-1] == 0
    assert file.decode([size, *file.encode("def"), size + 5]) == "def"


def test_sentencepiece_pieces_are_bytes(tmp_path):
    vocabulary = {"<unk>": 0, "<s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    vocabulary |= {piece: 258 + i for i, piece in enumerate(["▁", "a", "b", "▁a", "▁ab", "ab"])}
    model = models.BPE(
        vocabulary, [("▁", "a"), ("a", "b"), ("▁a", "b")], byte_fallback=True, unk_token="<unk>"
    )
    path = train(
        tmp_path / "t.json",
        model=model,
        pre_tokenizer=None,
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        normalizer=normalizers.Replace(" ", "▁"),
    )
    file = tokenizer.load(path)
    for text in ["ab a  b", "☃ a\n", " ab"]:
        assert (
            b"".join(file.pieces[i] for i in file.encode(text))
            == text.encode()
            == file.decode(file.encode(text)).encode()
        )


def test_no_bits_per_byte_without_fixed_bytes(tmp_path, caplog):
    model = models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]")
    path = train(
        tmp_path / "t.json",
        model=model,
        decoder=decoders.WordPiece(),
        pre_tokenizer=pre_tokenizers.Whitespace(),
    )
    assert tokenizer.load(path).token_bytes is None
    assert "no bits per byte" in caplog.text and "WordPiece" in caplog.text


def test_report_says_what_was_lost(caplog, byte_level):
    tokenizer.report(tokenizer.load(byte_level), 100, 100)
    assert caplog.text == ""
    tokenizer.report(tokenizer.load(byte_level), 100, 101)
    assert "101 bytes where the text has 100" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("{}", "not a Hugging Face"), ("{not json", "not a Hugging Face")],
)
def test_unusable_files_are_refused(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        tokenizer.load(str(path))
    assert error.value.field == "tokenizer"


def test_wide_vocabularies_take_four_bytes(tmp_path):
    vocabulary = {f"{i:x}": i for i in range((1 << 16) + 1)}
    model = models.WordLevel(vocabulary, unk_token="0")
    path = train(tmp_path / "t.json", model=model, pre_tokenizer=None, decoder=decoders.Fuse())
    assert tokenizer.load(path).dtype == np.dtype("<u4")
