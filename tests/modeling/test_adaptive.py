"""Adaptive embedding and softmax against a computation from their definition, in float64 and without clusters."""

import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from ssm_lm import S4Config, S4ForCausalLM, S4Model
from ssm_lm.modeling.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from ssm_lm.training.param_groups import parameter_groups

V, H, CUTOFFS = 100, 16, [20, 60]
BOUNDS = [(0, 20), (20, 60), (60, 100)]


OWN = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 1, "initializer_range": 0.02}
config = partial(tiny_config, **OWN, adaptive_cutoffs=CUTOFFS)


def model(seed=0, **kw):
    """With parameters that training has moved: nothing at its special starting value."""
    m = tiny_model(seed=seed, **(OWN | {"adaptive_cutoffs": CUTOFFS} | kw))
    with torch.no_grad():
        for parameter in m.lm_head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return m


def ids(rows=2, length=40):
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(3))


def full_softmax(head: AdaptiveSoftmax, hidden: torch.Tensor) -> torch.Tensor:
    """log p(v | h) as a product of probabilities, one token id after the other, in float64."""
    p = {name: value.detach().double() for name, value in head.state_dict().items()}
    hidden = hidden.double()
    first = torch.cat(
        [
            hidden @ p["projection_0"] @ p["weight_0"].T + p["bias_0"],
            hidden @ p["projection_0"] @ p["cluster_weight"].T + p["cluster_bias"],
        ],
        -1,
    ).softmax(-1)
    columns = []
    for v in range(V):
        cluster = next(i for i, (low, high) in enumerate(BOUNDS) if low <= v < high)
        if cluster == 0:
            columns.append(first[..., v])
            continue
        logits = hidden @ p[f"projection_{cluster}"] @ p[f"weight_{cluster}"].T + p[f"bias_{cluster}"]
        inside = logits.exp() / logits.exp().sum(-1, keepdim=True)
        columns.append(first[..., BOUNDS[0][1] + cluster - 1] * inside[..., v - BOUNDS[cluster][0]])
    return torch.stack(columns, -1).log()


def test_parameter_count_of_the_wikitext_103_model():
    """Upstream's model: 203,743,232 in the backbone, 38,313,376 in the embedding, 1,319,386 in the softmax besides."""
    keys = {"hidden_size": 1024, "num_hidden_layers": 16, "state_size": 64, "n_ssm": 1, "vocab_size": 267735}
    with torch.device("meta"):
        m = S4ForCausalLM(S4Config(**keys, adaptive_cutoffs=[19997, 39997, 199997], adaptive_div_val=4))
    assert sum(p.numel() for p in m.parameters()) == 243_375_994
    assert sum(p.numel() for p in m.model.embed_tokens.parameters()) == 38_313_376


def test_embedding_is_its_definition():
    embedding = model().model.embed_tokens
    got = embedding(ids())
    for row in range(2):
        for column, v in enumerate(ids()[row].tolist()):
            i = next(i for i, (low, high) in enumerate(BOUNDS) if low <= v < high)
            vector = getattr(embedding, f"weight_{i}")[v - BOUNDS[i][0]]
            expected = math.sqrt(H) * getattr(embedding, f"projection_{i}") @ vector
            torch.testing.assert_close(got[row, column], expected, rtol=1e-5, atol=1e-6)


def test_log_probabilities_are_exact_and_sum_to_one():
    m = model()
    hidden = torch.randn(3, 7, H)
    got = m.lm_head(hidden)
    assert got.shape == (3, 7, V)
    torch.testing.assert_close(got.double(), full_softmax(m.lm_head, hidden), rtol=1e-5, atol=1e-5)
    assert (got.double().exp().sum(-1) - 1).abs().max() < 1e-5


def test_logits_are_the_log_probabilities():
    m = model()
    out = m(ids(), logits_to_keep=5)
    assert out.logits.shape == (2, 5, V)
    hidden = m.model(ids()).last_hidden_state[:, -5:]
    torch.testing.assert_close(out.logits.double(), full_softmax(m.lm_head, hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"num_items_in_batch": 11}, {"shift_labels": True}])
def test_loss_equals_the_full_softmax(training, kwargs):
    m = model().train(training)
    labels = ids().clone()
    labels[0, :9] = -100
    if "shift_labels" in kwargs:
        kwargs = {"shift_labels": labels}
    out = m(ids(), labels=labels, **kwargs)
    targets = labels if "shift_labels" in kwargs else F.pad(labels, (0, 1), value=-100)[:, 1:]
    full = full_softmax(m.lm_head, m.model(ids()).last_hidden_state)
    expected = F.nll_loss(full.flatten(0, 1), targets.flatten(), reduction="sum")
    expected = expected / kwargs.get("num_items_in_batch", (targets != -100).sum())
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-6, atol=0)
    assert (out.logits is None) == training


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("fixed_shape", [False, True])
def test_gradients_are_those_of_the_log_probabilities(monkeypatch, chunk_size, fixed_shape):
    """Rows of the tail's own tokens, and the shapes that do not depend on the data: the same numbers."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: fixed_shape)
    head = model().double().lm_head
    hidden = torch.randn(30, H, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (30,))
    targets[4] = -100
    inputs = [hidden, *head.parameters()]
    expected = F.nll_loss(head(hidden), targets, reduction="sum")
    wanted = torch.autograd.grad(expected, inputs)
    ours = head(hidden, targets, chunk_size)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    for got, want in zip(torch.autograd.grad(ours, inputs), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("targets", [[0, 5, 19], [25, 59], [60, 99], [-100, -100]])
def test_clusters_without_a_token(targets):
    m = model().train()
    hidden = torch.randn(len(targets), H)
    loss = m.lm_head(hidden, torch.tensor(targets))
    loss.backward()
    full = full_softmax(m.lm_head, hidden)
    expected = F.nll_loss(full, torch.tensor(targets), reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-12)
    assert all(p.grad is not None for p in m.lm_head.parameters())  # data parallel ranks have the same gradients


def test_the_loss_never_holds_the_vocabulary():
    from test_losses import LargestTensor

    tokens, vocabulary = 64, 4000
    head = AdaptiveSoftmax(vocabulary, 8, [50, 100], div_val=2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    hidden = torch.randn(tokens, 8, requires_grad=True)
    targets = torch.randint(0, 120, (tokens,))
    with LargestTensor() as seen:
        head(hidden, targets, chunk_size=2).backward()
    assert seen.elements <= 3900 * 2  # the weights of the largest cluster, of width 2


def test_initialisation_is_the_recipe():
    torch.manual_seed(0)
    m = S4ForCausalLM(
        S4Config(vocab_size=4000, hidden_size=64, num_hidden_layers=1, state_size=4, adaptive_cutoffs=[1000])
    )
    embedding, head = m.model.embed_tokens, m.lm_head
    for i, width in enumerate((64, 16)):
        assert getattr(embedding, f"weight_{i}").std().item() == pytest.approx(0.5 * width**-0.5, rel=0.05)
        assert getattr(embedding, f"projection_{i}").std().item() == pytest.approx(0.5 * 64**-0.5, rel=0.1)
        assert getattr(head, f"bias_{i}").abs().max().item() == pytest.approx(64**-0.5, rel=0.01)
    for name in ("projection_0", "cluster_weight", "cluster_bias"):
        assert not getattr(head, name).any()
    # the first predictions are those of the biases: no token looks at the text yet, in the first softmax
    a, b = m.eval()(torch.randint(0, 4000, (2, 5))).logits[:, -1]
    torch.testing.assert_close(a[:1000], b[:1000])
    assert not torch.allclose(a[1000:], b[1000:])


@pytest.mark.parametrize(
    ("kw", "tied", "own"),
    [
        ({}, ["weight_0", "weight_1", "weight_2", "projection_1", "projection_2"], ["projection_0"]),
        ({"adaptive_tie_projections": False}, ["weight_0", "weight_2"], ["projection_0", "projection_1"]),
        ({"tie_word_embeddings": False}, [], ["weight_0", "weight_2", "projection_0", "projection_1"]),
    ],
)
def test_what_is_tied_is_stored_once_and_survives(tmp_path, kw, tied, own):
    m = model(**kw)
    m.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for cls in (S4ForCausalLM, AutoModelForCausalLM):
        loaded, found = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(found.values()), found
        assert torch.equal(loaded.eval()(ids()).logits, m(ids()).logits)
        for name in tied:
            assert getattr(loaded.lm_head, name) is getattr(loaded.model.embed_tokens, name)
            assert f"lm_head.{name}" not in stored
        for name in own:
            assert getattr(loaded.lm_head, name) is not getattr(loaded.model.embed_tokens, name)
            assert f"lm_head.{name}" in stored
    assert torch.equal(S4Model.from_pretrained(tmp_path)(ids()).last_hidden_state, m.model(ids()).last_hidden_state)


def test_bfloat16(tmp_path):
    m = model()
    m.save_pretrained(tmp_path)
    half = S4ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    assert half.lm_head.weight_2.dtype == torch.bfloat16
    out = half(ids(), labels=ids())
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    torch.testing.assert_close(out.loss, m(ids(), labels=ids()).loss, rtol=1e-2, atol=0)
    logits = half.eval()(ids()).logits
    assert logits.dtype == torch.float32
    assert (logits.double().exp().sum(-1) - 1).abs().max() < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = m.train()(ids(), labels=ids()).loss
    torch.testing.assert_close(autocast, out.loss, rtol=1e-2, atol=0)


def test_parameters_that_a_checkpoint_lacks_are_initialised(tmp_path):
    from safetensors.torch import save_file

    m = model()
    m.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in state.items() if not key.startswith("lm_head.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = S4ForCausalLM.from_pretrained(tmp_path)
    assert not loaded.lm_head.projection_0.any()
    assert 0 < loaded.lm_head.bias_2.abs().max() <= H**-0.5
    assert torch.equal(loaded.lm_head.weight_2, m.lm_head.weight_2)  # tied: it came with the embedding


def test_generate_is_the_argmax_of_full_forwards():
    m = model()
    prompt = ids(1, 6)
    generated = m.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    sequence = prompt
    for _ in range(12):
        sequence = torch.cat([sequence, m(sequence).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, sequence)


def test_embeddings_and_resizing():
    m = model()
    assert isinstance(m.get_input_embeddings(), AdaptiveEmbedding)
    torch.testing.assert_close(m(inputs_embeds=m.get_input_embeddings()(ids())).logits, m(ids()).logits)
    with pytest.raises(NotImplementedError, match="cannot be resized"):
        m.resize_token_embeddings(V + 1)
    assert m.resize_token_embeddings(V) is m.get_input_embeddings()
    with pytest.raises(ValueError, match="AdaptiveEmbedding"):
        m.set_input_embeddings(torch.nn.Embedding(V, H))
    other = AdaptiveEmbedding(V, H, CUTOFFS)
    m.set_input_embeddings(other)
    assert m.get_input_embeddings() is other
    plain = S4ForCausalLM(config(adaptive_cutoffs=None))
    assert plain.resize_token_embeddings(V + 5).num_embeddings == V + 5


def test_dropout_acts_in_training_alone():
    m = model(embedding_dropout=0.5, head_dropout=0.5)
    losses = {m(ids(), labels=ids()).loss.item() for _ in range(2)}
    assert len(losses) == 1
    m.train()
    hidden = torch.randn(30, H)
    assert len({m.lm_head(hidden, ids(1, 30)[0]).item() for _ in range(3)}) == 3
    assert not torch.equal(m.model.embed_tokens(ids()), m.model.embed_tokens(ids()))
    # on the narrow vectors, before the projection: entries of an embedding are not zeroed one by one
    assert m.model.embed_tokens(ids()).eq(0).float().mean() < 0.3


def test_every_parameter_has_its_group():
    m = model()
    groups = parameter_groups(m, 1e-3, 1e-4, 0.1)
    names = {id(p): n for n, p in m.named_parameters()}
    placed = {g["name"]: {names[id(p)] for p in g["params"]} for g in groups}
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert {"lm_head.bias_0", "lm_head.bias_2", "lm_head.cluster_bias"} <= placed["no_decay"]
    assert {"model.embed_tokens.weight_1", "lm_head.projection_0", "lm_head.cluster_weight"} <= placed["decay"]


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"adaptive_cutoffs": []}, "adaptive_cutoffs"),
        ({"adaptive_cutoffs": [60, 20]}, "adaptive_cutoffs"),
        ({"adaptive_cutoffs": [20, 100]}, "adaptive_cutoffs"),
        ({"adaptive_div_val": 0}, "adaptive_div_val"),
        ({"adaptive_div_val": 3}, "adaptive_div_val"),
        ({"head_dropout": 1.0}, "head_dropout"),
        ({"adaptive_cutoffs": None, "head_dropout": 0.1}, "head_dropout"),
        ({"loss_chunk_size": 0}, "loss_chunk_size"),
        ({"adaptive_cutoffs": ["a"]}, "adaptive_cutoffs"),
    ],
)
def test_bad_configs_name_the_key(kw, message):
    from huggingface_hub.errors import StrictDataclassError

    with pytest.raises((ValueError, StrictDataclassError), match=message):
        config(**kw)


def test_cutoffs_may_be_a_tuple_and_come_back_from_json(tmp_path):
    model(adaptive_cutoffs=(20, 60)).save_pretrained(tmp_path)
    assert S4Config.from_pretrained(tmp_path).adaptive_cutoffs == [20, 60]
