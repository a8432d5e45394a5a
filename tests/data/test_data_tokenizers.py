import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ssm_lm.data.bpe import END_OF_TEXT, train_bpe
from ssm_lm.data.pieces import pieces, pieces_of
from ssm_lm.data.prepare import prepare
from ssm_lm.data.tokenizer import Encoder, tokenizer_hash
from ssm_lm.data.words import train_words
from ssm_lm.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
ARTICLES = [
    " \n = Ada = \n \n Ada wrote the first program . \n",
    " \n = Bo = \n \n Bo read it ; he was happy . \n",
    " \n = Cy = \n \n Cy 's tea was <unk> , and the tea was the best . \n \n",
] * 5
BPE = train_bpe(ARTICLES, 300)
WORDS = train_words(ARTICLES)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_bpe_loses_nothing(text):
    ids = encode(BPE, text)
    assert BPE.decode(ids) == text
    assert all(0 <= number < len(BPE) for number in ids)


def test_bpe_loses_nothing_of_spaces_and_rare_characters():
    text = "  two , spaces .\r\n\t東京 \u2028🙂\x00\x1f n't  "
    assert BPE.decode(encode(BPE, text)) == text


def test_bpe_ids(tmp_path):
    assert len(BPE) == 300
    assert BPE.eos_token == BPE.bos_token == END_OF_TEXT
    assert (BPE.eos_token_id, BPE.pad_token_id) == (0, 1)
    assert BPE.eos_token_id != BPE.pad_token_id
    BPE.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_hash(again) == tokenizer_hash(BPE) == tokenizer_hash(train_bpe(iter(ARTICLES), 300))
    assert again.special_tokens_map == BPE.special_tokens_map
    assert again.decode(encode(again, ARTICLES[0])) == ARTICLES[0]


@pytest.mark.parametrize(("size", "documents"), [(257, ARTICLES), (300, [])])
def test_bpe_refuses(size, documents):
    with pytest.raises(UserError, match="258 or more" if documents else "no text"):
        train_bpe(documents, size)


@pytest.mark.timeout(60)
def test_bpe_trains_on_a_word_of_a_megabyte():
    tokenizer = train_bpe(["a" * 1_000_000], 262)
    assert tokenizer.tokenize("aaaa") == ["aaaa"]


def test_smallest_bpe_is_the_bytes():
    tokenizer = train_bpe(ARTICLES, 258)
    assert len(encode(tokenizer, "aé")) == 3


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab'st \n\t.\u00a0é1"), max_size=300), st.integers(5, 40))
def test_pieces_have_the_tokens_of_the_whole(text, size):
    # a word longer than a piece is the one thing that is cut inside; a line keeps within the piece here
    text = "\n".join(line[: size - 2] for line in text.split("\n"))
    text = "\n ".join(line for line in text.split("\n") if line.strip())
    parts = list(pieces(text, size))
    assert [number for part in parts for number in encode(BPE, part)] == encode(BPE, text)


def naive_words(text):
    """The published way: each line's words, then <eos>."""
    return [word for line in text.split("\n")[:-1] for word in [*line.split(), "<eos>"]]


def test_words_order_and_ids():
    tokenizer = train_words(["b a\n", "a c b\n", "d <eos>\n"])
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary, key=vocabulary.get) == ["<eos>", "b", "a", "c", "d", "<unk>"]
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 5)
    assert len(train_words(["b a\n", "a c b\n"], vocab_size=3)) == 3
    assert encode(train_words(["b a\n", "a c a\n"], vocab_size=3), "a b") == [1, 2]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(TEXT, st.sampled_from(["Ada", "<unk>", "x<unk>", "<eos>", " ", "\x1c", "\x85", "\u3000"]))))
def test_words_split_like_python(parts):
    text = " ".join(parts).replace("\x00", "") + "\n"
    vocabulary = WORDS.get_vocab()
    expected = [vocabulary.get(word, WORDS.unk_token_id) for word in naive_words(text)]
    assert encode(WORDS, text) == expected


def test_words_know_every_white_space_of_python():
    for character in map(chr, range(sys.maxunicode + 1)):
        if character.isspace() and character != "\n":
            assert len(encode(WORDS, f"Ada{character}Ada")) == 2, hex(ord(character))


def test_words_after_saving(tmp_path):
    WORDS.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = " x<unk> Ada wrote \n = Bo \n"
    assert encode(again, text) == encode(WORDS, text)
    assert encode(again, text)[0] == again.unk_token_id
    assert again.decode(encode(again, " Ada wrote \n tea \n")) == "Ada wrote \n tea \n"


def test_special_tokens_written_in_a_text_stay_text():
    (ids,) = Encoder.of(BPE).encode([(f"a{END_OF_TEXT}b", True)])
    assert ids[-1] == BPE.eos_token_id
    assert BPE.eos_token_id not in ids[:-1]
    assert BPE.decode(ids[:-1]) == f"a{END_OF_TEXT}b"


def test_long_documents_are_encoded_piecewise():
    document = " some words of a line . \n" * 50_000
    parts = list(pieces_of([(True, document), (True, "next")]))
    assert len(parts) == 3
    assert "".join(text for text, _ in parts) == document + "next"
    assert [last for _, last in parts] == [False] * (len(parts) - 2) + [True, True]
    ids = [number for ids in Encoder.of(BPE).encode(parts) for number in ids]
    assert ids.count(BPE.eos_token_id) == 2
    assert [number for number in ids if number != BPE.eos_token_id] == encode(BPE, document) + encode(BPE, "next")


def test_a_document_of_lines_ends_in_one_eos():
    found = Encoder.of(WORDS).encode([("Ada wrote \n", True), ("Ada", True), ("Bo \n \n", True)])
    assert [ids.count(0) for ids in found] == [1, 1, 2]
    assert all(ids[-1] == 0 for ids in found)


@pytest.mark.skipif(
    not (SHARED / "wikitext-2").is_dir(), reason="needs WikiText-2 in ../shared/data beside the repository"
)
def test_wikitext_2_has_the_published_counts(tmp_path):
    manifest = prepare(SHARED / "wikitext-2", "words", tmp_path / "out")
    assert manifest.vocab_size == 33_278
    splits = {split: (info.tokens, info.documents, info.sha256[:16]) for split, info in manifest.splits.items()}
    assert splits == {
        "train": (2_088_628, 600, "c9340289a553c5ca"),
        "validation": (217_646, 60, "0f559bbc00bf328c"),
        "test": (245_569, 60, "165d5683495e1daa"),
    }
