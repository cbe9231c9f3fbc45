import json
import random
from pathlib import Path

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
        assert bytes_.encode(text) == list(text.encode()) and bytes_.count(text) == len(text.encode())
    assert bytes_.token_bytes.tolist() == [1] * 256 + [0]
    assert bytes_.decode([256, 104, 105, 300, 0xFF]) == "hi�"
    [document] = bytes_.documents([b"\xff\x00a"])  # invalid UTF-8 is kept
    assert document.tolist() == [256, 255, 0, 97] and document.dtype == np.dtype("<u2")


def test_byte_level_file_is_lossless(byte_level):
    file = tokenizer.load(byte_level)
    assert file.doc_id == 0  # its own <s>, of which automatic ones and ones spelt in the text make no second
    for text, document in zip(TEXTS, file.documents([text.encode() for text in TEXTS]), strict=True):
        assert document[0] == 0 and not (document[1:] <= 1).any()
        assert document[1:].tolist() == file.encode(text) and file.count(text) == len(document) - 1
        assert file.decode(document) == text
        assert b"".join(file.pieces[i] for i in document) == text.encode()
        assert file.token_bytes[document].sum() == len(text.encode())


def test_invalid_utf8_is_replaced_and_counted(byte_level):
    file = tokenizer.load(byte_level)
    documents = file.documents([b"ok", b"a\xffb", b"\xfe"])
    assert [file.decode(document) for document in documents] == ["ok", "a�b", "�"]
    assert file.replaced == 2


def test_padding_truncation_and_dropout_of_the_file_are_off(tmp_path, byte_level):
    spec = tokenizers.Tokenizer.from_file(byte_level)
    spec.enable_truncation(2)
    spec.enable_padding(length=50)
    spec.model.dropout = 0.9
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


@pytest.mark.parametrize(
    "special", [("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"), ("<|endoftext|>", "<|startoftext|>")]
)
def test_the_first_token_of_a_public_model_separates_documents(tmp_path, special):
    """DeepSeek's, and that of LFM2 and Jamba, which have another special token of a common name."""
    path = train(
        tmp_path / "t.json",
        decoder=decoders.ByteLevel(),
        pre_tokenizer=pre_tokenizers.ByteLevel(),
        special=special,
    )
    assert tokenizer.load(path).doc_id == 1


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


def test_entries_outside_the_byte_alphabet_stand_for_themselves(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "a☃b", "c d", "\t"])}
    model = models.BPE(vocabulary, [])
    path = train(tmp_path / "t.json", model=model, pre_tokenizer=None, decoder=decoders.ByteLevel())
    file = tokenizer.load(path)
    ids = [vocabulary[token] for token in ("a", "a☃b", "Ġ", "c d", "\t", "b")]
    assert file.decode(ids) == "aa☃b c d\tb" == b"".join(file.pieces[i] for i in ids).decode()


def test_what_looks_like_a_byte_piece_is_one_only_if_it_is(tmp_path):
    vocabulary = {"<0xZZ>": 0, "<0x+1>": 1, "<0x41>": 2, "▁": 3}
    path = train(
        tmp_path / "t.json", model=models.BPE(vocabulary, []), pre_tokenizer=None,
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )  # fmt: skip
    assert tokenizer.load(path).pieces[:4] == [b"<0xZZ>", b"<0x+1>", b"A", b" "]


def test_a_word_that_a_file_cannot_encode_is_named(tmp_path):
    path = train(
        tmp_path / "t.json", model=models.WordLevel({"a": 0}), pre_tokenizer=pre_tokenizers.Whitespace(),
        decoder=decoders.Fuse(),
    )  # fmt: skip
    file = tokenizer.load(path)
    assert file.documents([b"a a"])[0].tolist() == [1, 0, 0]
    texts = [b"a", b"no such word", b"a"]
    for encode in (lambda: file.documents(texts), lambda: file.encode("no such word")):
        with pytest.raises(ConfigError, match=r"cannot encode 'no such word'.*Missing \[UNK\]") as error:
            encode()
        assert error.value.field == "tokenizer"


@pytest.mark.parametrize("where", ["vocab", "added_tokens"])
def test_an_id_that_would_fill_the_memory_is_refused(tmp_path, byte_level, where):
    described = json.loads(Path(byte_level).read_text())
    if where == "vocab":
        described["model"]["vocab"]["zz"] = 4_000_000_000
    else:
        described["added_tokens"][0]["id"] = 4_000_000_000
    (tmp_path / "t.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="has an id of 4,000,000,000, must be below 16,777,216"):
        tokenizer.load(str(tmp_path / "t.json"))


def test_merges_that_would_abort_the_process_are_refused(tmp_path, byte_level):
    described = json.loads(Path(byte_level).read_text())
    described["model"]["continuing_subword_prefix"] = "##"
    (tmp_path / "t.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="has not the continuing_subword_prefix '##'"):
        tokenizer.load(str(tmp_path / "t.json"))


def test_a_long_text_is_encoded_in_pieces_with_the_same_ids(byte_level, monkeypatch):
    chance = random.Random(0)
    words = [word for text in TEXTS for word in text.split(" ")] + ["\n\n", "  ", "\t", "x\n", "\r\n", "☃☃"]
    text = " ".join(chance.choice(words) for _ in range(5000))
    whole = tokenizer.load(byte_level).documents([text.encode()])[0]
    monkeypatch.setattr(tokenizer, "PIECE", 300)
    monkeypatch.setattr(tokenizer, "BATCH", 1000)
    file = tokenizer.load(byte_level)
    assert len(file._cut(text)) > 20 and "".join(file._cut(text)) == text
    short, document, last = file.documents([b"a", text.encode(), b"b"])
    assert document.tolist() == whole.tolist()
    assert (short.tolist(), last.tolist()) == ([0, *file.encode("a")], [0, *file.encode("b")])


def llama_like(tmp_path):
    """Words with their space before them; the decoder strips the first space, as Llama's does."""
    vocabulary = {"<unk>": 0, "▁": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    vocabulary |= {piece: 258 + i for i, piece in enumerate(["a", "b", "▁a", "▁ab", "ab"])}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return train(
        tmp_path / "t.json", model=models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"),
        pre_tokenizer=None, decoder=decoders.Sequence(chain),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )  # fmt: skip


def test_a_completion_keeps_the_space_before_its_first_word(tmp_path):
    file = tokenizer.load(llama_like(tmp_path))
    prompt, ids = file.encode("ab a"), file.encode("ab b☃")
    assert file.decode(ids) == "ab b☃"  # by itself it has lost a space
    assert file.decode_after(prompt, ids) == " ab b☃"
    assert file.decode_after([], ids) == "ab b☃"


@pytest.mark.parametrize("kind", ["bytes", "byte_level", "llama_like"])
def test_a_stream_gives_what_decoding_all_gives(tmp_path, byte_level, kind):
    names = {"bytes": "bytes", "byte_level": byte_level, "llama_like": llama_like(tmp_path)}
    file = tokenizer.load(names[kind])
    text = "ab a ☃\U0001f600 naïve  b\n" * 40
    ids = file.encode(text)
    assert len(ids) > 5 * tokenizer.CONTEXT
    for cut in (0, 1, 7, 150):
        stream = file.stream(ids[:cut])
        parts = [stream.add(token) for token in ids[cut:]]
        assert "".join(parts) + stream.end() == file.decode_after(ids[:cut], ids[cut:])
        assert max(map(len, parts)) < 8 and "\ufffd" not in "".join(parts)
    stream = file.stream()
    assert "".join(stream.add(i) for i in file.encode("a☃")[:-1]).strip() == "a"  # half a character is held
    assert "\ufffd" in stream.end()


def test_bytes_decode_after():
    bytes_ = tokenizer.load("bytes")
    assert bytes_.decode_after([97, 0xE2, 0x98], [0x83, 98]) == "☃b"
