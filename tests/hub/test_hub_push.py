"""`ssm-lm push` against a Hub on loopback: what arrives, what never leaves, and what is not sent twice."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from ssm_lm import S4Config, S4ForCausalLM, S4ForSequenceClassification
from ssm_lm.cli import main
from ssm_lm.data.bpe import train_bpe
from ssm_lm.hub.contents import _is_pickle
from ssm_lm.hub.export import export

REPO = Path(__file__).parents[2]
HUB_1_5 = huggingface_hub.__version__.startswith("1.5.")  # the lowest that is allowed


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export of several files of weights, with what a run leaves in its checkpoint laid beside it."""
    root = tmp_path_factory.mktemp("private-name")
    torch.manual_seed(0)
    config = S4Config(vocab_size=300, hidden_size=64, num_hidden_layers=2, state_size=8, eos_token_id=None)
    S4ForCausalLM(config).save_pretrained(root / "run")
    train_bpe(["the cat sat on the mat\n" * 5], 300).save_pretrained(root / "run")
    return export(root / "run", root / "tiny-s4", max_shard_size="150KB", license="mit", trained_on="cats")


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "tiny-s4")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server speaks LFS, not xet
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def push(folder, *arguments, repo="user/tiny", expect=0):
    assert main(["push", str(folder), "--repo", repo, *arguments]) == expect


def refusal(capsys, folder, *arguments, **kwargs):
    """The one line of a push that is refused."""
    capsys.readouterr()
    push(folder, *arguments, **kwargs, expect=2)
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert TOKEN not in printed.out + printed.err
    return printed.err


def local(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_arrives(folder, hub, capsys):
    push(folder)
    arrived = hub.files("user/tiny")
    assert arrived.keys() == local(folder).keys()
    for name, content in local(folder).items():
        assert hashlib.sha256(arrived[name]).digest() == hashlib.sha256(content).digest(), name
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert sorted(size for _, size in hub.uploads) == sorted(f.stat().st_size for f in folder.glob("*.safetensors"))
    repo = hub.repos["user/tiny"]
    assert repo.private
    assert [(branch, summary) for branch, summary, _ in repo.commits] == [("main", "Upload tiny-s4 with ssm_lm")]
    assert hub.leaks == []
    printed = capsys.readouterr()
    assert f"{hub.url}/user/tiny/commit/" in printed.out
    assert TOKEN not in printed.out + printed.err


def test_a_second_push_sends_nothing(folder, hub):
    push(folder)
    uploads, received = list(hub.uploads), hub.received
    push(folder)
    assert (hub.uploads, hub.received) == (uploads, received)
    assert len(hub.repos["user/tiny"].commits) == 1
    # a file that changed is the only one that is sent
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMore.\n")
    push(folder, "--message", "More")
    assert (hub.uploads, hub.received) == (uploads, received)
    branch, message, sent = hub.repos["user/tiny"].commits[-1]
    assert (branch, message) == ("main", "More")
    if HUB_1_5:  # sends again what goes into the commit itself, no weights
        assert "README.md" in sent
    else:
        assert sent == {"README.md": "file"}


def break_in_a_file(folder, hub) -> int:
    """Have the server cut the largest file in its middle; how many files of weights there are."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    hub.drop = hashlib.sha256(files[-1].read_bytes()).hexdigest(), files[-1].stat().st_size // 2
    return len(files)


@pytest.mark.parametrize("part_size", [None, 40_000])
def test_an_interrupted_push_goes_on(folder, hub, capsys, part_size):
    """The connection breaks in the middle of a file of weights, and stays broken."""
    hub.part_size = part_size
    count = break_in_a_file(folder, hub)
    assert "push again" in refusal(capsys, folder)
    first = {sha for sha, _ in hub.uploads}
    # hub 1.5 lets go of what has not begun when a file breaks
    assert len(first) == count - 1 or (HUB_1_5 and len(first) < count)
    assert hub.files("user/tiny") == {}  # half a model is never to be seen
    hub.drop, before = None, hub.received
    push(folder)
    assert hub.files("user/tiny") == local(folder)
    # nothing a second time: every file arrived once, and only the bytes of the missing ones were sent
    assert len(hub.uploads) == len({sha for sha, _ in hub.uploads}) == count
    assert hub.received - before == sum(size for sha, size in hub.uploads if sha not in first)


def test_revision_and_visibility(folder, hub, capsys):
    push(folder, "--revision", "v1/a", "--public")
    assert not hub.repos["user/tiny"].private
    assert hub.files("user/tiny", "v1/a") == local(folder)
    assert hub.files("user/tiny") == {}
    push(folder, "--revision", "v1/a", "--public")
    # the default is private, and a repository that everyone sees is not written to by default
    assert "is public; say --public" in refusal(capsys, folder)
    assert hub.files("user/tiny") == {}
    push(folder, repo="user/own")
    assert "is private; make it public" in refusal(capsys, folder, "--public", repo="user/own")


def test_weights_of_an_earlier_push_do_not_stay(folder, hub):
    push(folder)
    whole = shutil.copytree(folder, folder.parent / "whole")
    tensors = {}
    for file in sorted(whole.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (whole / "model.safetensors.index.json").unlink()
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    push(whole)
    assert hub.files("user/tiny") == local(whole)
    push(folder)
    assert hub.files("user/tiny") == local(folder)


def test_what_stays_behind(folder, hub, capsys):
    names = ("run.json", "trainer_state.json", "complete.json", "notes.txt", "secrets.py", ".env", "model.onnx")
    for name in names:
        (folder / name).write_text('{"place": "/home/someone/secret"}')
    (folder / "runs").mkdir()
    (folder / "runs" / "events").write_text("private")
    push(folder)
    assert hub.files("user/tiny").keys().isdisjoint({*names, "runs/events"})
    assert "modeling_s4.py" in hub.files("user/tiny")
    left = re.search("left behind.*: (.*)", capsys.readouterr().out)[1].split(", ")
    assert set(left) == {*names, "runs/"}


def as_zip(content):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return stream.getvalue()


PICKLE = pickle.dumps({"a": 1})


def test_a_header_as_long_as_a_pickle_begins_is_none(tmp_path):
    """A file of safetensors begins with the length of its header; 1,152, for one, are the bytes 80 04."""
    file, length = tmp_path / "model.safetensors", 0
    for padding in range(1000, 1100):
        save_file({"a": torch.zeros(1)}, file, metadata={"a": "b" * padding})
        length = int.from_bytes(file.read_bytes()[:8], "little")
        if length == 0x0480:
            break
    assert length == 0x0480
    assert not _is_pickle(file)
    file.write_bytes(file.read_bytes()[:-1])  # not whole: no safetensors
    assert _is_pickle(file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pytorch_model.bin", b""),
        ("optimizer.pt", PICKLE),
        ("sub/deep/rng.pth", b"x"),
        ("scaler.PKL", b"x"),
        ("x.ckpt", b"x"),
        ("notes.txt", PICKLE),
        ("vocab.json", PICKLE),
        ("notes", as_zip(PICKLE)),
    ],
)
def test_a_pickle_is_refused_whatever_its_name(folder, hub, capsys, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    text = refusal(capsys, folder)
    assert "is a pickle" in text
    assert name in text
    assert hub.requests == []


def test_a_link_that_leads_out_of_the_folder_is_refused(folder, hub, tmp_path, capsys):
    (tmp_path / "secret.txt").write_text("not for the Hub")
    for name in ("LICENSE", "notes/of.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(tmp_path / "secret.txt")
        assert "is a link to a place outside of the folder" in refusal(capsys, folder)
        (folder / name).unlink()
    assert hub.requests == []


def edit_json(folder, name, **values):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda f: (f / "README.md").unlink(), "holds no model card"),
        (lambda f: (f / "config.json").unlink(), "is no exported model"),
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "model.safetensors: no such file"),
        (lambda f: next(f.glob("model-00002*")).unlink(), "no such file"),
        (lambda f: next(f.glob("model-00002*")).write_bytes(b"{}"), "truncated or damaged"),
        (lambda f: (f / "ssm.py").unlink(), "the code of the model is not whole"),
        (lambda f: (f / "ssm.py").write_text("def f(:"), "is not what its name says"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "is not what its name says"),
        (lambda f: edit_json(f, "config.json", auto_map=None), "has no auto_map"),
        (lambda f: edit_json(f, "config.json", auto_map={"AutoConfig": "../x.S4Config"}), "lies elsewhere"),
        (lambda f: edit_json(f, "config.json", num_hidden_layers=1), "unexpected"),
        (lambda f: edit_json(f, "config.json", _name_or_path="/home/someone/runs/7"), "names a place"),
        (lambda f: edit_json(f, "config.json", note={"in": ["C:\\Users\\someone\\x"]}), "names a place"),
        (lambda f: edit_json(f, "tokenizer_config.json", name_or_path="~/runs/secret"), "names a place"),
        (lambda f: (f / "README.md").write_text(f"made in {Path.cwd()}/runs"), "names a place"),
    ],
)
def test_a_bad_folder_is_refused_before_anything_is_sent(folder, hub, capsys, spoil, expected):
    spoil(folder)
    assert expected in refusal(capsys, folder)
    assert hub.requests == []


def test_a_run_is_to_be_exported_first(exported, hub, capsys):
    assert "`ssm-lm export` first" in refusal(capsys, exported.parent / "run")


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "user/..", "user/a b", "user/x.git", "/tiny", "user/"])
def test_bad_names(folder, hub, capsys, repo):
    assert f"--repo {repo}:" in refusal(capsys, folder, repo=repo)
    assert hub.requests == []


def test_who_may_not(folder, hub, capsys, monkeypatch, tmp_path):
    assert "HTTP 403: the token may not write there" in refusal(capsys, folder, repo="another/tiny")
    for status, expected in ((401, "does not know the token"), (404, "no such"), (409, "push again"), (500, "again")):
        hub.fail = {"/preupload/": status}
        text = refusal(capsys, folder)
        assert f"HTTP {status}: " in text
        assert expected in text
    hub.fail = {}
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    capsys.readouterr()
    push(folder, expect=2)
    text = capsys.readouterr().err
    assert "HTTP 401: the Hub does not know the token; log in with `hf auth login`" in text
    assert "hf_another" not in text
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "no token for the Hub; log in with" in refusal(capsys, folder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(capsys, folder)


def test_nobody_there(folder, hub, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9/user/tiny: " in refusal(capsys, folder)


def test_a_token_in_a_message_is_not_printed(folder, hub, capsys, monkeypatch):
    hub.fail, hub.failure = {"/preupload/": 400}, f"who is {TOKEN}?"
    assert "who is ***?" in refusal(capsys, folder)
    hub.fail = {}
    for wrong in ("\n x", "\u20ac"):  # the complaint of the HTTP library would quote it
        monkeypatch.setattr("huggingface_hub.get_token", lambda wrong=wrong: TOKEN + wrong)
        assert "characters that no token has" in refusal(capsys, folder)


def test_a_classifier_of_numbers(tmp_path, hub):
    """Without a tokenizer: its input is numbers."""
    config = S4Config(
        vocab_size=1, hidden_size=8, num_hidden_layers=1, state_size=4, input_size=3, bidirectional=True, num_labels=5
    )
    S4ForSequenceClassification(config).save_pretrained(tmp_path / "run")
    push(export(tmp_path / "run", tmp_path / "out"))
    assert b"inputs_embeds=torch.zeros(1, 100, 3)" in hub.files("user/tiny")["README.md"]


def command_line(hub, tmp_path, **more):
    """The environment of a process for which that server is the Hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return environment | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(REPO),
        **more,
    }


FROM_THE_HUB = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ssm_lm":
            raise ModuleNotFoundError("ssm_lm is not here", name=name)

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, repo, revision = sys.argv[1:]
ids = torch.randint(1, 300, (2, 70), generator=torch.Generator().manual_seed(0))
outputs = []
for source, more in ((folder, {}), (repo, {"revision": revision})):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, **more)
    tokenizer = AutoTokenizer.from_pretrained(source, **more)
    with torch.no_grad():
        generated = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        outputs.append((model(ids).logits, generated, tokenizer("the cat")["input_ids"]))
assert torch.equal(outputs[0][0], outputs[1][0])
assert torch.equal(outputs[0][1], outputs[1][1])
assert outputs[0][2] == outputs[1][2]
print("all is well")
"""


@pytest.mark.slow
def test_it_loads_from_there_where_ssm_lm_is_not_installed(folder, hub, tmp_path):
    push(folder, "--revision", "v1")
    (tmp_path / "load.py").write_text(FROM_THE_HUB)
    environment = command_line(hub, tmp_path, PYTHONPATH="")
    command = [sys.executable, str(tmp_path / "load.py"), str(folder), "user/tiny", "v1"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all is well" in done.stdout
    # and ssm-lm's own verbs take the name
    command = [sys.executable, "-m", "ssm_lm", "export", "user/own", "--output", str(tmp_path / "again")]
    push(folder, repo="user/own")
    done = subprocess.run(command, env=command_line(hub, tmp_path), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    again = load_file(tmp_path / "again" / "model.safetensors")
    for file in folder.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            assert torch.equal(again[key], tensor), key


@pytest.mark.slow
def test_a_killed_push_goes_on_and_the_token_is_nowhere(folder, hub, tmp_path):
    """The process itself, with all that huggingface_hub can log, killed in the middle of a file."""
    count, hub.hang_at_drop = break_in_a_file(folder, hub), True
    environment = command_line(hub, tmp_path, HF_DEBUG="1", HF_HUB_VERBOSITY="debug", TRANSFORMERS_VERBOSITY="debug")
    command = [sys.executable, "-m", "ssm_lm", "push", str(folder), "--repo", "user/tiny"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
        assert hub.reached_drop.wait(120)
        deadline = time.monotonic() + 20
        while len(hub.uploads) < count - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    first = {sha for sha, _ in hub.uploads}
    assert len(first) == count - 1
    hub.drop, hub.hang_at_drop, before = None, False, hub.received
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.files("user/tiny") == local(folder)
    assert hub.received - before == sum(size for sha, size in hub.uploads if sha not in first)
    assert "api/models/user/tiny/commit" in done.stderr  # the debug log is on
    assert TOKEN not in done.stdout + done.stderr + (tmp_path / "log").read_text()
    for place in (tmp_path, folder):
        for file in place.rglob("*"):
            assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
    assert TOKEN not in str(hub.repos["user/tiny"].commits)
