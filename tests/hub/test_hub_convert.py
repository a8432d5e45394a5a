"""Checkpoints of state-spaces/s4 against what upstream's own code computed, in three versions of their names."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ssm_lm import S4ForCausalLM
from ssm_lm.cli import main
from ssm_lm.hub.convert import convert
from ssm_lm.loading.model import load_model

FIXTURE = Path(__file__).parents[2].parent / "shared" / "reference" / "upstream" / "s4_v4_small.pt"
pytestmark = pytest.mark.skipif(not FIXTURE.is_file(), reason=f"the upstream checkpoint {FIXTURE.name} is not here")
LENGTH = 128


@pytest.fixture
def v4():
    return torch.load(FIXTURE, weights_only=True)


@pytest.fixture(scope="module")
def expected():
    return {key: torch.from_numpy(value) for key, value in np.load(FIXTURE.with_suffix(".npz")).items()}


def as_v3(state: dict) -> dict:
    """The renaming of upstream's v3 to v4, backwards."""
    old = {}
    for key, value in state.items():
        key = key.replace(".layer.layer.kernel.", ".layer.kernel.kernel.").replace(".layer.layer.D", ".layer.D")
        if key.endswith("kernel.inv_dt"):
            key, value = key.replace("inv_dt", "log_dt"), value[:, 0]
        elif key.endswith("kernel.A_real"):
            key = key.replace("A_real", "inv_w_real")
        elif key.endswith("kernel.A_imag"):
            key, value = key.replace("A_imag", "w_imag"), -value
        elif key.endswith("kernel.l_kernel"):
            key = key.replace("l_kernel", "L")
        old[key] = value
    return old


def as_v1(state: dict) -> dict:
    """A model that v1 could have stored: B, P, C of every channel in one tensor, conjugated C, norms of two numbers."""
    old = {}
    for key, value in state.items():
        base = key.rsplit(".", 1)[0]
        krylov = base.replace(".layer.layer.kernel", ".layer.kernel.krylov")
        if key.endswith("kernel.inv_dt"):
            old[f"{krylov}.log_dt"] = value[:, 0]
        elif key.endswith("kernel.A_real"):
            old[f"{krylov}.w"] = torch.stack([-value[0].exp(), -state[f"{base}.A_imag"][0]], -1)
        elif key.endswith("kernel.C"):
            conjugate = torch.tensor([1.0, -1.0])
            p = state[f"{base}.P"][0].expand_as(value[0])
            old[f"{krylov}.C"] = torch.stack([value[0] * conjugate, p], 1)
            old[f"{krylov}.B"] = torch.stack([state[f"{base}.B"][0].expand_as(p), p], 1)
        elif key.endswith("kernel.l_kernel"):
            old[f"{krylov}.nodes"] = torch.zeros(int(value) // 2 + 1, 2)
        elif ".kernel." in key:
            continue
        elif key.endswith("layer.layer.D"):
            old[key.replace("layer.layer.D", "layer.D")] = value[0]
        elif key.endswith(".norm.norm.weight"):
            old |= {f"{base}.m": torch.zeros(1), f"{base}.s": value[:1]}
        elif key.endswith(".norm.norm.bias"):
            continue
        elif re.search(r"layer\..*\.bias$", key):
            old[key] = value[:, None]
        else:
            old[key] = value
    return old


def save(state, path: Path) -> Path:
    torch.save(state, path)
    return path


def converted(state, tmp_path, name="model", **kwargs) -> S4ForCausalLM:
    convert(save(state, tmp_path / f"{name}.pt"), tmp_path / name, **kwargs)
    model, found = S4ForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("form", [lambda state: state, as_v3, lambda state: {"state_dict": state, "epoch": 3}])
@torch.no_grad()
def test_it_computes_what_upstream_computed(v4, expected, tmp_path, form):
    model = converted(form(v4), tmp_path)
    ids = expected["input_ids"]
    hidden = model.model(ids[:, :LENGTH]).last_hidden_state
    assert relative(hidden, expected["hidden"]) < 1e-5
    assert (hidden - expected["hidden"]).abs().max() < 1e-4 * expected["hidden"].abs().max()
    kernel = model.model.layers[0].sublayers[0].inner.ssm.kernel(LENGTH)
    assert relative(kernel, expected["layer0_kernel"][0]) < 1e-4
    nll = model.lm_head(hidden.flatten(0, 1), ids[:, 1:].flatten()) / ids[:, 1:].numel()
    assert nll.item() == pytest.approx(expected["nll"].item(), rel=1e-5)
    log_probabilities = model(ids[:, :LENGTH]).logits
    gathered = -log_probabilities.gather(-1, ids[:, 1:, None]).mean()
    assert gathered.item() == pytest.approx(expected["nll"].item(), rel=1e-5)


@torch.no_grad()
def test_the_order_of_the_clusters_matters(v4, expected, tmp_path):
    """That the test above can fail: the tails of upstream's first softmax are counted from the end."""
    v4["loss.cluster_weight"], v4["loss.cluster_bias"] = torch.randn(2, 64), torch.randn(2)
    right = converted(v4, tmp_path, "right")
    for prefix in ("loss", "loss_val"):
        for key in ("cluster_weight", "cluster_bias"):
            v4[f"{prefix}.{key}"] = v4[f"loss.{key}"].flip(0)
    wrong = converted(v4, tmp_path, "wrong")
    ids = expected["input_ids"][:, :LENGTH]
    a, b = right(ids).logits.exp(), wrong(ids).logits.exp()
    torch.testing.assert_close(a[..., :200], b[..., :200])
    assert (a[..., 200:600].sum(-1) - b[..., 200:600].sum(-1)).abs().max() > 0.1
    # by hand: cluster 1 is the last column
    hidden = right.model(ids).last_hidden_state @ v4["loss.out_projs.0"]
    head = torch.cat([v4["encoder.0.emb_layers.0.weight"], v4["loss.cluster_weight"]])
    bias = torch.cat([v4["loss.out_layers_biases.0"], v4["loss.cluster_bias"]])
    first = (hidden @ head.T + bias).softmax(-1)
    torch.testing.assert_close(b[..., 200:600].sum(-1), first[..., -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_v1(v4, tmp_path, expected):
    ids = expected["input_ids"]
    for key in v4:
        if key.endswith("norm.norm.weight"):
            v4[key] = torch.full_like(v4[key], 1.3)
        elif key.endswith("norm.norm.bias"):
            v4[key] = torch.zeros_like(v4[key])
    new, old = converted(v4, tmp_path, "new"), converted(as_v1(v4), tmp_path, "old")
    assert (new.config.n_ssm, old.config.n_ssm) == (1, 64)  # v1 shares nothing but Lambda
    for module in new.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-12  # v1's norm has none
    torch.testing.assert_close(old(ids).logits, new(ids).logits, rtol=1e-4, atol=1e-4)


def test_v1_needs_a_length(v4, tmp_path, capsys):
    old = {key: value for key, value in as_v1(v4).items() if not key.endswith("nodes")}
    path = save(old, tmp_path / "old.pt")
    assert main(["convert", str(path), "--output", str(tmp_path / "out")]) == 2
    assert "--l-max" in capsys.readouterr().err
    assert main(["convert", str(path), "--output", str(tmp_path / "out"), "--l-max", str(LENGTH)]) == 0
    nodes = converted(as_v1(v4), tmp_path, "nodes")
    assert all(
        torch.equal(a, b) for a, b in zip(load_model(tmp_path / "out").parameters(), nodes.parameters(), strict=True)
    )


@torch.no_grad()
def test_a_model_that_never_ran_stores_c_itself(v4, tmp_path):
    for key in v4:
        if key.endswith("l_kernel"):
            v4[key] = torch.tensor(0)
    model = converted(v4, tmp_path)
    C = v4["model.layers.0.layer.layer.kernel.C"][0]
    assert torch.equal(model.model.layers[0].sublayers[0].inner.ssm.C, torch.cat([C[..., 0], C[..., 1]], -1))


@torch.no_grad()
def test_c_is_recovered_from_its_truncation(v4, tmp_path):
    """C -> C~ by upstream's formula, on the dense complex system of conjugate pairs -> C again."""
    prefix = "model.layers.0.layer.layer.kernel."
    shape = v4[f"{prefix}C"].shape
    C = torch.view_as_complex(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    Lambda = -v4[f"{prefix}A_real"][0].double().exp() - 1j * v4[f"{prefix}A_imag"][0].double()
    P = torch.view_as_complex(v4[f"{prefix}P"].double())[0, 0]
    Lambda, P = torch.cat([Lambda, Lambda.conj()]), torch.cat([P, P.conj()])
    A = torch.diag(Lambda) - torch.outer(P, P.conj())
    dt = v4[f"{prefix}inv_dt"].double().exp()[..., None]
    eye = torch.eye(len(P))
    power = torch.linalg.matrix_power(torch.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A), LENGTH)
    truncated = torch.einsum("hn,hnm->hm", torch.cat([C, C.conj()], -1), eye - power)[:, : shape[2]]
    v4[f"{prefix}C"] = torch.view_as_real(truncated)[None].float()
    model = converted(v4, tmp_path)
    ours = model.model.layers[0].sublayers[0].inner.ssm.C
    torch.testing.assert_close(ours.double(), torch.cat([C.real, C.imag], -1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_recurrent_generation_agrees_with_the_full_forward(v4, expected, tmp_path):
    model = converted(v4, tmp_path)
    ids = expected["input_ids"][:, :64]
    whole = model(ids).logits
    cache, steps = None, []
    for position in range(ids.shape[1]):
        out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)

    generated = model.generate(ids[:1, :10], max_new_tokens=20, do_sample=False, eos_token_id=None)
    sequence = ids[:1, :10]
    for _ in range(20):
        sequence = torch.cat([sequence, model(sequence).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, sequence)


def test_untied_weights_stay_untied(v4, tmp_path):
    for i in range(3):
        v4[f"loss.out_layers_weights.{i}"] = torch.randn_like(v4[f"encoder.0.emb_layers.{i}.weight"])
        if i:
            v4[f"loss.out_projs.{i}"] = torch.randn_like(v4[f"encoder.0.emb_projs.{i}"])
    model = converted(v4, tmp_path)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight_1, v4["loss.out_layers_weights.1"])
    assert torch.equal(model.lm_head.projection_2, v4["loss.out_projs.2"])
    assert torch.equal(model.model.embed_tokens.weight_1, v4["encoder.0.emb_layers.1.weight"])


# ---- the vocabulary


@pytest.fixture
def words(tmp_path):
    """A word-level vocabulary of `size` tokens, as `ssm-lm prepare` makes it."""
    from ssm_lm.data.words import train_words

    def make(size):
        folder = tmp_path / f"words{size}"
        train_words([" ".join(f"w{i}" for i in range(size - 2)) + "\n"]).save_pretrained(folder)
        return folder

    return make


def test_a_tokenizer_lies_beside_the_model(v4, words, tmp_path):
    from ssm_lm.loading.tokenizer import load_tokenizer

    model = converted(v4, tmp_path, tokenizer=words(1000))
    assert model.config.eos_token_id == 0
    assert len(load_tokenizer(tmp_path / "model")) == 1000


def test_a_vocabulary_that_is_off_by_one(v4, words, tmp_path, capsys):
    path = save(v4, tmp_path / "v4.pt")
    assert main(["convert", str(path), "--output", str(tmp_path / "out"), "--tokenizer", str(words(999))]) == 2
    assert "has 999 tokens and the model 1,000" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- bad files: one line, exit code 2, nothing written


def refused(tmp_path, capsys, path, *arguments) -> str:
    before = sorted(tmp_path.iterdir())
    assert main(["convert", str(path), "--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    assert error.startswith("ssm-lm: ")
    assert sorted(tmp_path.iterdir()) == before
    return error


class Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_does_not_run(v4, tmp_path, capsys, zipped):
    trace = tmp_path / "trace"
    path = tmp_path / "bad.pt"
    state = v4 | {"harmless": Malicious(f"touch {trace}")}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert "system" in refused(tmp_path, capsys, path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # it would have


def damage(content: bytes, how: str) -> bytes:
    return {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "garbage": os.urandom(5000),
        "text": b"not a checkpoint\n",
        "overwritten": content[:100] + os.urandom(200) + content[300:],
    }[how]


@pytest.mark.parametrize("how", ["truncated", "empty", "garbage", "text", "overwritten"])
def test_damaged_files(tmp_path, capsys, how):
    path = tmp_path / "bad.pt"
    path.write_bytes(damage(FIXTURE.read_bytes(), how))
    assert "bad.pt" in refused(tmp_path, capsys, path)


LAYER = "model.layers.0.layer.layer."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}kernel.C": None}, "kernel.C' is missing"),
        ({f"{LAYER}D": None}, "layer.D' is missing"),
        ({"loss.cluster_bias": None}, "cluster_bias' is missing"),
        ({"model.norm.norm.weight": None}, "model.norm.norm.weight' is missing"),
        ({"encoder.0.emb_projs.2": None}, "emb_projs.2' is missing"),
        ({f"{LAYER}kernel.Q": torch.zeros(1)}, "kernel.Q' has no place"),
        ({"decoder.weight": torch.zeros(1)}, "'decoder.weight' has no place"),
        ({f"{LAYER}kernel.C": torch.zeros(2, 64, 8, 2)}, "(2, 64, 8, 2)"),
        ({f"{LAYER}kernel.P": torch.zeros(2, 1, 8, 2)}, "(2, 1, 8, 2)"),
        ({"model.layers.2.layer.ff.2.weight": torch.zeros(64, 255)}, "(64, 255)"),
        ({f"{LAYER}kernel.inv_dt": torch.full((64, 1), float("nan"))}, "not finite"),
        ({f"{LAYER}kernel.l_kernel": torch.tensor(-3)}, "l_kernel is -3"),
        ({"loss.shared_out_projs.1": torch.zeros(64, 16)}, "should be a copy"),
    ],
)
def test_checkpoints_that_are_not_whole(v4, tmp_path, capsys, change, message):
    state = {key: value for key, value in (v4 | change).items() if value is not None}
    assert message in refused(tmp_path, capsys, save(state, tmp_path / "bad.pt"))


def test_other_files(v4, tmp_path, capsys):
    assert "no such file" in refused(tmp_path, capsys, tmp_path / "nowhere.pt")
    path = save(v4, tmp_path / "v4.pt")
    assert "is a checkpoint of v4, not of v3" in refused(tmp_path, capsys, path, "--version", "v3")
    assert "not the 64 of --l-max" in refused(tmp_path, capsys, path, "--l-max", "64")
    assert "--l-max must be positive" in refused(tmp_path, capsys, path, "--l-max", "0")
    assert "holds no state_dict" in refused(tmp_path, capsys, save([1, 2], tmp_path / "list.pt"))
    other = save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    assert "no S4 layers" in refused(tmp_path, capsys, other)
    gap = {key: value for key, value in v4.items() if not key.startswith("model.layers.1.")}
    assert "block 1 of 6 is missing" in refused(tmp_path, capsys, save(gap, tmp_path / "gap.pt"))
    short = {key: value for key, value in v4.items() if not key.startswith("model.layers.5.")}
    assert "[S4, S4, FFN]" in refused(tmp_path, capsys, save(short, tmp_path / "short.pt"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.layers.0.norm.norm.m", 0.5, "a shift that no LayerNorm has"),
        ("model.layers.0.layer.kernel.krylov.C", 7.0, "p and q apart"),
        ("model.layers.0.layer.kernel.krylov.w", 7.0, "unstable"),
    ],
)
def test_what_v1_can_learn_and_this_package_cannot(v4, tmp_path, capsys, key, value, message):
    old = as_v1(v4)
    old[key] = torch.full_like(old[key], value)
    assert message in refused(tmp_path, capsys, save(old, tmp_path / "old.pt"))


def test_an_output_that_holds_something_is_left_alone(tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("mine")
    assert "not an empty folder" in refused(tmp_path, capsys, FIXTURE)
    assert [file.name for file in output.iterdir()] == ["precious"]


def test_the_command_writes_a_whole_folder(tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["convert", str(FIXTURE), "--output", str(output)]) == 0
    assert "136,554 parameters" in capsys.readouterr().out
    assert json.loads((output / "config.json").read_text())["adaptive_cutoffs"] == [200, 600]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert load_model(output).config.vocab_size == 1000
