"""Text behind a URL: the bytes of the same text in a folder, and one line where its package is not there."""

import functools
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from ssm_lm.cli import main


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def address(folder):
    """Of a server on this machine that hands out the folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_url_gives_what_the_file_gives(address, folder, tmp_path):
    pytest.importorskip("aiohttp")
    documents = [{"text": f"Document {n} has {n * n} words.\n"} for n in range(4000)]
    (folder / "long.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, place in (("there", f"{address}/long.jsonl"), ("here", folder / "long.jsonl")):
        asked = ["--dataset", str(place), "--tokenizer", "bpe:300", "--hold-out", "0.05"]
        assert main(["prepare", *asked, "--output", str(tmp_path / name)]) == 0
    for file in ("train.bin", "validation.bin", "test.bin", "tokenizer/tokenizer.json"):
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()
    assert (tmp_path / "there" / "train.bin").stat().st_size > 10_000


def test_a_url_that_is_not_there(address, refused, tmp_path):
    pytest.importorskip("aiohttp")
    error = refused("prepare", "--dataset", f"{address}/none.txt", "--tokenizer", "words", "--output", tmp_path / "out")
    assert f"{address}/none.txt" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/x.txt", "s3fs"), ("gs://bucket/*.txt", "gcsfs")])
def test_a_package_that_is_not_installed(url, package, refused, tmp_path, monkeypatch):
    def absent(url):
        raise ImportError(f"Install {package}")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    error = refused("prepare", "--dataset", url, "--tokenizer", "words", "--output", tmp_path / "out")
    assert f"pip install {package}" in error
