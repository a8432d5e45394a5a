"""PEFT, quantised linear layers, pipelines and torch.compile, as with any other causal LM of transformers."""

import pytest
import tiny
import torch
from tiny import MIXTURE, checkpoint_activations, tiny_model
from torch._dynamo.testing import CompileCounter
from transformers import GenerationConfig, PreTrainedTokenizerFast, StaticCache, pipeline

from ssm_lm import S4ForCausalLM, S4Model
from ssm_lm.data.bpe import train_bpe

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "chunk_size": 8}
ENDLESS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
PROJECTIONS = ["in_proj", "out_proj", "gate_proj", "up_proj", "down_proj"]
BLOCKS = {"ssm": "s4d", "arch": MIXTURE}


def build(**kw):
    return tiny_model(**(SIZES | ENDLESS | kw))


def prompt(length=12, batch=2, vocabulary=60):
    return tiny.prompt(length, batch, vocabulary=vocabulary)


def greedy(model, ids, tokens=8, **options):
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": tokens, **options}
    return model.generate(input_ids=ids, generation_config=GenerationConfig(**options))


# ---- PEFT


@pytest.mark.parametrize("kw", [{"ssm": "s4"}, {"ssm": "s4d"}, {"ssm": "s5"}, BLOCKS], ids=str)
def test_lora_on_the_projections(kw, tmp_path):
    peft = pytest.importorskip("peft")
    ids = prompt()
    adapter = peft.LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build(**kw), adapter)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name and any(p in name for p in PROJECTIONS) for name in trainable)
    torch.testing.assert_close(model(ids).logits, build(**kw)(ids).logits)  # B starts at zero

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.train()(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    with torch.no_grad():
        logits = model.eval()(ids).logits
        generated = greedy(model, ids)
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(build(**kw), tmp_path).eval()
        assert torch.equal(loaded(ids).logits, logits)
        merged = loaded.merge_and_unload()
        assert type(merged) is S4ForCausalLM
        torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(greedy(merged, ids), generated)


def test_lora_with_gradient_checkpointing():
    peft = pytest.importorskip("peft")
    ids, gradients = prompt(), []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        adapter = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian", task_type="CAUSAL_LM")
        model = peft.get_peft_model(build(), adapter).train()
        if checkpointing:
            model.enable_input_require_grads()
            checkpoint_activations(model.base_model.model)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


# ---- quantised linear layers


def test_torchao_quantises_the_projections_and_nothing_else(tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model, ids = build(), prompt()
    model.save_pretrained(tmp_path)
    quantised = S4ForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map="cpu"
    )
    plain = dict(model.named_parameters())
    kinds = {name: type(p.data).__name__ for name, p in quantised.named_parameters()}
    changed = {name for name, kind in kinds.items() if kind not in ("Tensor", "Parameter")}
    assert changed == {name for name in plain if name.rsplit(".", 2)[1] in PROJECTIONS and name.endswith("weight")}
    for name, value in quantised.named_parameters():
        if name not in changed:
            assert torch.equal(value, plain[name]), name
    with torch.no_grad():
        exact, close = model(ids).logits, quantised(ids).logits
    assert 0 < (exact - close).abs().max() < 0.1 * exact.abs().max()
    assert greedy(quantised, ids).shape == (2, 20)


# ---- pipelines


@pytest.fixture(scope="module")
def talker():
    tokenizer = train_bpe(["the cat sat on the mat\n" * 5], 300)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = build(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    return model, tokenizer, pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")


def test_text_generation_pipeline(talker):
    model, tokenizer, generator = talker
    options = {"max_new_tokens": 6, "do_sample": False}
    texts = ["the cat", "the mat sat on the cat and the"]
    alone = [generator(text, **options)[0]["generated_text"] for text in texts]
    for text, generated in zip(texts, alone, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert generated == tokenizer.decode(greedy(model, ids, 6)[0], skip_special_tokens=True)
    together = generator(texts, batch_size=2, **options)
    assert [answer[0]["generated_text"] for answer in together] == alone
    several = generator(texts[0], num_return_sequences=2, num_beams=2, return_full_text=False, **options)
    assert len(several) == 2
    assert not several[0]["generated_text"].startswith("the cat")


def test_feature_extraction_pipeline(talker):
    model, tokenizer, _ = talker
    extractor = pipeline("feature-extraction", model=model.model, tokenizer=tokenizer, device="cpu")
    features = extractor("the cat", return_tensors=True)
    with torch.no_grad():
        expected = model.model(**tokenizer("the cat", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(features, expected)
    assert isinstance(model.model, S4Model)


# ---- torch.compile


@pytest.mark.parametrize("kw", [{"ssm": "s4"}, {"ssm": "s4d"}, {"ssm": "s5"}, BLOCKS], ids=str)
@torch.no_grad()
def test_a_compiled_decode_step_is_traced_once(kw):
    torch._dynamo.reset()
    model, ids = build(**kw), prompt(20)
    expected = model(ids, use_cache=False).logits
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    cache = StaticCache(config=model.config, max_cache_len=64)
    for _ in range(2):  # a cache that was reset is as new, to the compiled graph too
        model(ids[:, :14], past_key_values=cache)
        for t in range(14, 20):
            step = compiled(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(step.logits[:, 0], expected[:, t], rtol=1e-4, atol=1e-4)
        cache.reset()
    assert counter.frame_count == 1


TRAINING = [
    {},
    {"mode": "fft"},
    {"ssm": "s4d", "arch": "s4"},
    BLOCKS,
    {"ssm": "s4d", "loss_chunk_size": 16},
    {"ssm": "s4d", "adaptive_cutoffs": [20], "adaptive_div_val": 2},
]


@pytest.mark.parametrize("kw", [{"ssm": "s5"}, *(pytest.param(kw, marks=pytest.mark.slow) for kw in TRAINING)], ids=str)
def test_a_training_step_has_no_graph_breaks(kw):
    """And loss and gradients are those without torch.compile; with adaptive softmax whatever cluster a token is in."""
    torch._dynamo.reset()
    model, ids = build(**({"hidden_size": 8, "mode": "chunk", "arch": "s4-ffn"} | kw)).train(), prompt(19)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = run(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inductor(tmp_path):
    """The real compiler, on the decoding that generate() compiles on a GPU. Every mixer."""
    from transformers import CompileConfig

    torch._dynamo.reset()
    model, ids = build(arch=["ssm", "ffn", *MIXTURE], num_hidden_layers=1), prompt(12)
    expected = greedy(model, ids, 12)
    compile_config = CompileConfig(fullgraph=True, dynamic=False)
    compile_config._compile_all_devices = True  # without it only on accelerators
    options = {"cache_implementation": "static", "compile_config": compile_config}
    for _ in range(2):
        assert torch.equal(greedy(model, ids, 12, **options), expected)


@pytest.mark.long
@pytest.mark.seconds(110)
def test_inductor_in_training():
    """The real compiler, forward and backward. Every mixer."""
    torch._dynamo.reset()
    model, ids = build(arch=["ssm", "ffn", *MIXTURE], num_hidden_layers=1), prompt(12)
    gradients = []
    for run in (model.train(), torch.compile(model, fullgraph=True)):
        model.zero_grad()
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
