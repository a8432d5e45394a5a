import bz2
import gzip
import io
import json
import lzma
import random
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssm_lm.data import text_files
from ssm_lm.data.documents import file_ranges
from ssm_lm.data.pieces import pieces, pieces_of
from ssm_lm.data.text_files import DOCUMENTS, read_documents, split_documents
from ssm_lm.errors import UserError

LINES = st.lists(
    st.sampled_from(["\n", " \n", "= A =\n", " = B = \n", " = = C = = \n", "word\n", " x y\r\n", "é\x0c\n"])
)


@given(LINES, st.text(max_size=8), st.sampled_from(DOCUMENTS))
def test_documents_concatenate_to_the_text(lines, tail, documents):
    tail = tail.replace("\n", "")
    lines = [*lines, tail] if tail else lines
    found = list(split_documents(lines, documents))
    assert "".join(found) == "".join(lines)
    assert all(found)


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("file", [" \n = A = \n \n x \n = 1 = \n y \n \n z \n \n = B = \n \n w \n"]),
        ("auto", [" \n = A = \n \n x \n = 1 = \n y \n \n z \n \n", " = B = \n \n w \n"]),
        ("heading", [" \n = A = \n \n x \n = 1 = \n y \n \n z \n \n", " = B = \n \n w \n"]),
        ("blank", [" \n = A = \n \n", " x \n = 1 = \n y \n \n", " z \n \n", " = B = \n \n", " w \n"]),
        ("line", [" \n = A = \n \n", " x \n", " = 1 = \n", " y \n \n", " z \n \n", " = B = \n \n", " w \n"]),
    ],
)
def test_where_documents_begin(documents, expected):
    text = " \n = A = \n \n x \n = 1 = \n y \n \n z \n \n = B = \n \n w \n"
    assert list(split_documents(text.splitlines(keepends=True), documents)) == expected


def test_auto_is_the_whole_file_without_a_heading():
    assert list(split_documents(["plain\n", "\n", "= A =\n", "\n"])) == ["plain\n\n= A =\n\n"]


def test_sections_are_no_articles():
    assert len(list(split_documents(["= A =\n", "\n", "= = B = =\n", "\n", "== C ==\n", "\n"], "heading"))) == 1


@pytest.mark.parametrize(("suffix", "module"), [(".xz", lzma), (".gz", gzip), (".bz2", bz2)])
def test_compressed_text_is_the_text(tmp_path, suffix, module):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(module.compress("año\r\nb\n".encode()))
    assert list(read_documents(path, "line")) == ["año\r\n", "b\n"]
    path.write_bytes(module.compress(b"x" * 5000)[:-12])
    with pytest.raises(UserError, match=rf"a\.txt\{suffix}.*damaged"):
        list(read_documents(path))


def test_rows_of_json_and_parquet(tmp_path):
    texts = ["one\ntwo", "", "drei ü"]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps({"body": text}) for text in texts) + "\n")
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), table)
    for path in (lines, table):
        assert list(read_documents(path, text_field="body")) == ["one\ntwo", "drei ü"]
        with pytest.raises(UserError, match="no field 'text', only body"):
            list(read_documents(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not an object"),
        ('{"text": 3}', "field 'text' is int"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        list(read_documents(path))


def test_invalid_utf8_names_the_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("é\nab".encode() + b"\xff\n")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte 5"):
        list(read_documents(path))


@given(st.text(alphabet="ab \n\tü", max_size=200), st.integers(1, 30))
def test_pieces_concatenate_and_are_short(text, size):
    found = list(pieces(text, size))
    assert "".join(found) == text
    assert all(0 < len(piece) <= size for piece in found)


@given(
    st.lists(st.text(alphabet="ab \n\tü", min_size=1, max_size=60), max_size=8), st.integers(1, 30), st.integers(1, 9)
)
def test_pieces_do_not_depend_on_the_parts_that_a_text_comes_in(documents, size, part):
    marked = [
        (start == 0, document[start : start + part])
        for document in documents
        for start in range(0, len(document), part)
    ]
    expected = []
    for document in documents:
        found = list(pieces(document, size))
        expected += [(piece, number == len(found)) for number, piece in enumerate(found, 1)]
    assert list(pieces_of(marked, size)) == expected


def test_a_line_that_is_too_long_to_be_held(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST_LINE", 10)
    path = tmp_path / "a.txt"
    path.write_text("= A =\n\nüüüüüüüüüüüü = A =\n\n= B =\n\nxé")
    parts = list(text_files.read_marked(path))
    assert max(len(text.encode()) for _, text in parts) <= 10
    assert [document[:5] for document in text_files.joined(parts)] == ["= A =", "= B ="]
    path.write_bytes("üüüüüüüüüüüü".encode() + b"\xff")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte 24"):
        list(text_files.read_marked(path))
    path.write_bytes("üüü".encode()[:-1])
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte 4"):
        list(text_files.read_marked(path))


def test_the_parts_of_a_file_are_the_file(tmp_path):
    texts = ["one", "", "two ü", "three\nlines", "4", "five" * 9]
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), table, row_group_size=2)
    for path, sizes in ((lines, range(1, 200)), (table, (1, 40, 10**9))):
        for size in sizes:
            ranges = file_ranges([path], "auto", "text", size)
            assert [text for part in ranges for _, text in part()] == list(filter(None, texts))
    lines.write_text(lines.read_text() + "{\n")
    *_, last = file_ranges([lines], "auto", "text", 20)
    with pytest.raises(UserError, match="line 8 is not JSON"):
        list(last())


def test_the_middle_of_a_compressed_file_cannot_be_entered(tmp_path):
    paths = [tmp_path / f"{number}.jsonl.gz" for number in range(40)]
    for path in paths:
        path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert file_ranges(paths[:3], "auto", "text") is None
    assert len(list(file_ranges(paths, "auto", "text"))) == 40


def test_a_row_group_is_not_held_whole():
    texts = [random.Random(number).randbytes(2000).hex() for number in range(4000)]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, use_dictionary=False, write_statistics=False)
    sizes = []

    class Opened(io.BytesIO):
        def read(self, size=-1):
            sizes.append(size)
            return super().read(size)

    path = SimpleNamespace(suffixes=[".parquet"], open=lambda mode: Opened(file.getvalue()))
    assert [text for _, text in text_files.read_marked(path)] == texts
    assert len(file.getvalue()) > 15 << 20
    assert max(sizes) < 6 << 20
