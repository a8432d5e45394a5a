"""Random and corrupted files: one clear line, in bounded time and memory, and nothing in them runs."""

import contextlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import struct
import time

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.cli import main
from ssm_lm.data.bpe import train_bpe
from ssm_lm.errors import UserError
from ssm_lm.loading.model import load_model
from ssm_lm.loading.tokenizer import load_tokenizer

KEYS = [
    *("vocab_size", "hidden_size", "num_hidden_layers", "arch", "ssm", "state_size", "ssm_init", "discretization"),
    *("dt_min", "dt_max", "n_ssm", "b_clip", "ssm_blocks", "bidirectional", "mode", "chunk_size", "intermediate_size"),
    *("conv_size", "head_dim", "expand"),
    *("hidden_act", "glu", "norm", "dropout", "tie_dropout", "input_size", "pooling", "layer_norm_epsilon"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "adaptive_cutoffs"),
    *("adaptive_div_val", "head_dropout", "loss_chunk_size", "model_type", "architectures", "auto_map", "dtype"),
    *("torch_dtype", "id2label", "label2id", "num_labels", "problem_type", "quantization_config", "layer_types"),
    *("transformers_weights", "attn_implementation", "_attn_implementation", "sublayers", "to_dict", "from_dict"),
    *(
        "is_encoder_decoder",
        "output_hidden_states",
        "return_dict",
        "name_or_path",
        "transformers_version",
        "max_length",
    ),
    *("pruned_heads", "tie_encoder_decoder", "gradient_checkpointing", "_commit_hash", "sub_configs", "text_config"),
    *("experts_implementation", "distributed_config", "fusion_config", "base_model_tp_plan", "rope_parameters"),
]
NUMBERS = [0, 1, 2, 3, -1, 2**31, 2**63, 10**12, 10**30, -(10**12), 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf]
WORDS = [
    "",
    "s4",
    "s4d",
    "s5",
    "gpt2",
    "ssm",
    "h3",
    "gated",
    "chunk",
    "rms",
    "none",
    "float16",
    "int8",
    "x\x00",
    "é",
    "../x.bin",
    "{}",
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.integers()
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def times(count):
    """The same examples on every run; the fixtures are fit for many."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


SECONDS, MIB = 10, 400  # for one folder: the machine may be busy, and a hang or a tensor of 10^12 is far beyond


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    keys = {"vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 4, "eos_token_id": None}
    S4ForCausalLM(S4Config(**keys)).save_pretrained(folder)
    train_bpe(["the cat sat on the mat\n" * 5], 300).save_pretrained(folder)
    for file in folder.glob("*.py"):
        file.unlink()
    load_model(folder)  # what is imported on the way is not counted below
    load_tokenizer(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@contextlib.contextmanager
def bounded():
    start, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MIB << 10


def outcome(folder, load=load_model):
    """The model, or the line about it; anything else fails the test."""
    with bounded():
        try:
            return load(folder)
        except UserError as error:
            text = str(error)
    assert "\n" not in text
    assert len(text) > 20
    return text


def check_works(model):
    """What did load is a model: finite numbers of the right shape, or the line that says why not."""
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 300)


def refused(folder, expected, load=load_model):
    text = outcome(folder, load)
    assert isinstance(text, str)
    assert expected in text
    return text


# ---- configurations


@times(int(os.environ.get("EXAMPLES", 100)))
@given(change=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
@example(change={"hidden_size": 10**12})
@example(change={"num_hidden_layers": 10**12})
@example(change={"num_labels": 10**12})
@example(change={"chunk_size": 4096})
@example(change={"state_size": 10**12})
@example(change={"adaptive_cutoffs": list(range(1, 299)), "adaptive_div_val": 10**1000})
@example(change={"to_dict": "x"})
@example(change={"dtype": "int8"})
@example(change={"output_hidden_states": [None]})
@example(change={"id2label": [[]]})
@example(change={"architectures": True})
@example(change={"transformers_weights": "../../x.bin"})
@example(change={"quantization_config": {"quant_method": "torchao"}})
def test_random_values_of_keys(saved, tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    values = json.loads((saved / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    model = outcome(folder)
    if not isinstance(model, str):
        check_works(model)
        model.config.to_json_string()


@times(100)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["cut", "flip", "insert", "swap"]))
def test_damaged_text_of_a_config(saved, tmp_path, seed, kind):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    (folder / "config.json").write_bytes(damage((saved / "config.json").read_bytes(), kind, random.Random(seed)))
    outcome(folder)


def damage(content: bytes, kind: str, chance: random.Random) -> bytes:
    content, place = bytearray(content), chance.randrange(len(content))
    if kind == "cut":
        return bytes(content[:place])
    if kind == "insert":
        return bytes(content[:place] + chance.randbytes(chance.randrange(1, 9)) + content[place:])
    if kind == "swap":
        other = chance.randrange(len(content))
        content[place], content[other] = content[other], content[place]
    else:
        content[place] ^= 1 << chance.randrange(8)
    return bytes(content)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "cannot be read"),
        ("[]", "holds list"),
        ('"s4"', "holds str"),
        ("null", "holds NoneType"),
        ("{}", "model_type is None"),
        ("[" * 100_000, "cannot be read"),
        ('{"a":' * 100_000, "cannot be read"),
        ('{"model_type": "s4", "x": ' + "9" * 5000 + "}", "cannot be read"),
        ("\xff\xfe", "cannot be read"),
        (b"\x80\x04\x95", "cannot be read"),
        ('{"model_type": "llama"}', "another architecture"),
        ('{"model_type": ["s4"]}', "another architecture"),
    ],
)
def test_configs_that_are_none(folder, text, expected):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode("latin-1"))
    refused(folder, expected)


def test_a_config_beyond_reason_is_not_read(folder):
    with open(folder / "config.json", "wb") as file:
        file.truncate(8 << 30)  # a hole: it takes no room
    refused(folder, "larger than 64 MiB")


# ---- weights


@times(100)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["cut", "flip", "insert", "swap"]), in_header=st.booleans())
def test_damaged_weights(saved, tmp_path, seed, kind, in_header):
    """A flipped bit of a number is not to be noticed; anything in the header is."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    content, chance = (saved / "model.safetensors").read_bytes(), random.Random(seed)
    if in_header:
        end = 8 + struct.unpack("<Q", content[:8])[0]
        content = damage(content[:end], kind, chance) + content[end:]
    else:
        content = damage(content, kind, chance)
    (folder / "model.safetensors").write_bytes(content)
    outcome(folder)


def header_of(content: bytes) -> tuple[dict, bytes]:
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def with_header(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def lie(change):
    """A change of the header alone; the file keeps its numbers."""

    def spoil(folder):
        header, data = header_of((folder / "model.safetensors").read_bytes())
        change(header)
        (folder / "model.safetensors").write_bytes(with_header(header, data))

    return spoil


def edit(change):
    """A change of the tensors, in a file that is sound."""

    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated or damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}"), "truncated or damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 10**8) + b"{}"), "truncated or damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}"), "missing"),
        (lie(lambda h: h[NORM].update(shape=[10**12])), "truncated or damaged"),
        (lie(lambda h: h[NORM].update(shape=[2**40, 2**40])), "truncated or damaged"),
        (lie(lambda h: h[NORM].update(data_offsets=[0, 2**60])), "truncated or damaged"),
        (lie(lambda h: h[NORM].update(dtype="I32")), "of dtype: model.norm.weight (I32)"),
        (lie(lambda h: h[NORM].update(dtype="F99")), "truncated or damaged"),
        (lie(lambda h: h.update(renamed=h.pop(NORM))), "missing: model.norm.weight"),
        (edit(lambda t: t.pop(NORM)), "missing: model.norm.weight"),
        (edit(lambda t: t.pop("model.embed_tokens.weight")), "missing: "),
        (edit(lambda t: t.pop("model.layers.0.sublayers.0.inner.ssm.C")), "missing: "),
        (edit(lambda t: t.update(extra=torch.ones(1))), "unexpected: extra"),
        (edit(lambda t: t.update({NORM: torch.ones(9)})), "of another shape: model.norm.weight is 9, not 8"),
        (edit(lambda t: t.update({NORM: torch.ones(())})), "of another shape: model.norm.weight"),
        (edit(lambda t: t.update({NORM: torch.ones(8, dtype=torch.int64)})), "of dtype: model.norm.weight (I64)"),
        (edit(lambda t: t.update({NORM: torch.ones(8, dtype=torch.complex64)})), "of dtype: model.norm.weight (C64)"),
        (edit(lambda t: t.clear()), "missing: "),
    ],
)
def test_weights_that_do_not_fit(folder, spoil, expected):
    spoil(folder)
    refused(folder, expected)


def test_shards(saved, folder):
    model = load_model(saved)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    first = min(values["weight_map"].values())
    assert not isinstance(outcome(folder), str)
    for change, expected in (
        ({"weight_map": []}, "not an index of weights"),
        ({"weight_map": {NORM: 7}}, "not an index of weights"),
        ({"weight_map": values["weight_map"] | {NORM: "../saved.safetensors"}}, "no safetensors file of the folder"),
        ({"weight_map": values["weight_map"] | {NORM: "/etc/passwd"}}, "no safetensors file of the folder"),
        ({"weight_map": values["weight_map"] | {NORM: "weights.bin"}}, "no safetensors file of the folder"),
        ({"weight_map": values["weight_map"] | {NORM: "none.safetensors"}}, "no such file"),
        ({"weight_map": values["weight_map"] | {"extra": first}}, "not in both the index and the files"),
        ({"weight_map": {k: v for k, v in values["weight_map"].items() if k != NORM}}, "not in both the index"),
    ):
        index.write_text(json.dumps(values | change))
        refused(folder, expected)
    index.write_text("[" * 100_000)
    refused(folder, "cannot be read")


# ---- nothing runs


class Canary:
    """A pickle of it makes a folder where it is loaded."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00001.safetensors"])
def test_no_pickle_runs_whatever_its_name(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    content = pickle.dumps(Canary(tmp_path / "sang"))
    (folder / name).write_bytes(content)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: name}}))
    assert isinstance(outcome(folder), str)
    for verb in (["generate", str(folder), "--prompt", "a"], ["export", str(folder), "--output", str(tmp_path / "x")]):
        assert main(verb) == 2
    assert not (tmp_path / "sang").exists()
    pickle.loads(content)
    assert (tmp_path / "sang").exists()  # it would have


def test_no_code_of_the_folder_runs(folder, tmp_path):
    """Neither of the model nor of its tokenizer, nor a decoding method that lies in the folder."""
    code = f"import os\nos.mkdir({str(tmp_path / 'sang')!r})\n"
    for name in ("evil.py", "modeling_s4.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    for name, auto_map in (
        ("config.json", {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B", "AutoTokenizer": ["evil.C", None]}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.C", "evil.D"]}),
    ):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"auto_map": auto_map}))
    assert not isinstance(outcome(folder), str)
    outcome(folder, load_tokenizer)
    main(["generate", str(folder), "--prompt", "the cat", "--max-new-tokens", "2"])
    main(["export", str(folder), "--output", str(tmp_path / "exported")])
    assert not (tmp_path / "sang").exists()


# ---- tokenizers and the verbs


@times(60)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["cut", "flip", "insert", "swap"]),
    name=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]),
)
def test_damaged_tokenizers(saved, tmp_path, seed, kind, name):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(damage((saved / name).read_bytes(), kind, random.Random(seed)))
    outcome(folder, load_tokenizer)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("verb", ["eval", "generate", "export", "push"])
def test_every_verb_says_it_in_one_line(folder, tmp_path, capsys, monkeypatch, name, verb):
    (folder / "README.md").write_text("---\n---\n")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    (tmp_path / "test.txt").write_text("the cat\n")
    arguments = {
        "eval": ["--data", str(tmp_path / "test.txt")],
        "generate": ["--prompt", "the cat"],
        "export": ["--output", str(tmp_path / "out")],
        "push": ["--repo", "user/name"],
    }
    capsys.readouterr()
    assert main([verb, str(folder), *arguments[verb]]) == 2
    assert capsys.readouterr().err.count("\n") == 1
