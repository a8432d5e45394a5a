"""Without a network, what is asked of the Hub is answered at once and in one line; clients would try for a minute."""

import socket
import threading
import time
import urllib.request

import pytest
from huggingface_hub import constants

from ssm_lm import hub_access
from ssm_lm.cli import main


@pytest.fixture
def nowhere(monkeypatch):
    """A Hub that refuses connections, which nobody has set HF_HUB_OFFLINE for."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "getproxies", dict)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prepare", "--dataset", "{text}", "--tokenizer", "user/name", "--output", "{out}"], "--tokenizer user/name"),
        (["prepare", "--dataset", "wikitext-2", "--tokenizer", "bpe:300", "--output", "{out}"], "from the Hub"),
        (["generate", "user/name", "--prompt", "x"], "user/name"),
    ],
    ids=["tokenizer", "dataset", "model"],
)
def test_it_is_said_at_once(nowhere, tmp_path, capsys, monkeypatch, words, expected):
    (tmp_path / "text.txt").write_text("a cat\n" * 50)
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)  # as the clients do between attempts
    assert main([word.format(text=tmp_path / "text.txt", out=tmp_path / "out") for word in words]) == 2
    error = capsys.readouterr().err
    assert expected in error.splitlines()[-1]
    assert sum(waits) < 1
    assert constants.HF_HUB_OFFLINE is False
    assert not (tmp_path / "out").exists()


def test_a_hub_that_is_there(nowhere, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_access.is_reachable()
        with hub_access.asking_the_hub():
            assert constants.HF_HUB_OFFLINE is False


def test_behind_a_proxy_the_proxy_is_asked(nowhere, monkeypatch):
    assert not hub_access.is_reachable()
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"http": "http://proxy:3128"})
    assert hub_access.is_reachable()


def test_a_look_up_that_hangs_is_not_waited_for(nowhere, monkeypatch):
    release = threading.Event()

    def hang(*args, **kwargs):
        release.wait(60)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", hang)
    monkeypatch.setattr(hub_access, "PATIENCE", 0.1)
    begin = time.monotonic()
    assert not hub_access.is_reachable()
    assert time.monotonic() - begin < 20
    release.set()
