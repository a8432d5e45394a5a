"""The formula of FLOPs against what PyTorch counts while the real model trains."""

import pytest
import torch
from tiny import checkpoint_activations
from torch.utils.flop_counter import FlopCounterMode

from ssm_lm import S4Config, S4ForCausalLM, S4ForSequenceClassification
from ssm_lm.costs.flops import total, training_flops

aten = torch.ops.aten
# PyTorch's counter knows these out of place only
IN_PLACE = {
    aten.baddbmm_: lambda self, a, b, *args, out_shape=None, **kwargs: 2 * a[0] * a[1] * a[2] * b[2],
    aten.addmm_: lambda self, a, b, *args, out_shape=None, **kwargs: 2 * a[0] * a[1] * b[1],
}
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 16, "chunk_size": 16}


def counted(model, checkpointing=False, **inputs) -> int:
    if checkpointing:
        checkpoint_activations(model)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        model.train()(**inputs).loss.backward()
    return counter.get_total_flops()


def matmuls(parts) -> float:
    return sum(part.forward + part.backward + part.recompute for part in parts)


LAYERS = [
    ("s4", "chunk", {}),
    ("s4", "chunk", {"ssm_init": "legt", "arch": "s4-ffn"}),  # rank 2
    ("s4", "fft", {}),
    ("s4", "recurrent", {}),
    ("s4", "recurrent", {"ssm_init": "legt"}),
    ("s4d", "chunk", {"arch": "s4-ffn"}),
    ("s4d", "chunk", {"arch": ["ffn", "ssm", "swiglu"]}),
    ("s4", "chunk", {"arch": "h3"}),
    ("s5", "chunk", {"arch": ["h3", "gated"], "expand": 3, "head_dim": 2}),
    ("ssd", "chunk", {"arch": "gated", "head_dim": 8}),
    ("ssd", "recurrent", {"arch": ["gated", "swiglu"], "expand": 1, "selective_dt": True, "head_dim": 8}),
    ("s4d", "fft", {"glu": "half"}),
    ("s4d", "recurrent", {}),
    ("s4d", "auto", {}),
    ("s5", "chunk", {"arch": "s4-ffn"}),
    ("s5", "fft", {}),
    ("s5", "recurrent", {}),
    ("s5", "associative", {"arch": "ssm", "glu": "none"}),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("ssm", "mode", "keys"), LAYERS)
def test_a_training_step(ssm, mode, keys, checkpointing):
    """50 tokens: three chunks of 16 and one of 2."""
    config = S4Config(**SMALL | keys | {"ssm": ssm, "mode": mode, "use_cache": False})
    tokens = torch.randint(0, 96, (2, 50))
    found = counted(S4ForCausalLM(config), checkpointing, input_ids=tokens, labels=tokens, skip_logits=True)
    assert matmuls(training_flops(config, 2, 50, checkpointing=checkpointing)) == pytest.approx(found, rel=0.01)


def test_dropout_makes_the_last_matmul_of_a_block_run_again():
    config = S4Config(**SMALL, ssm="s4d", dropout=0.1, use_cache=False)
    tokens = torch.randint(0, 96, (2, 50))
    found = counted(S4ForCausalLM(config), True, input_ids=tokens, labels=tokens, skip_logits=True)
    assert matmuls(training_flops(config, 2, 50, checkpointing=True)) == pytest.approx(found, rel=0.01)


def test_a_carried_state_keeps_auto_from_the_fft():
    config = S4Config(**SMALL, ssm="s4d")
    tokens = torch.randint(0, 96, (2, 50))
    model = S4ForCausalLM(config)
    found = counted(model, input_ids=tokens, labels=tokens, skip_logits=True, use_cache=True)
    assert matmuls(training_flops(config, 2, 50, needs_state=True)) == pytest.approx(found, rel=0.01)
    assert found != pytest.approx(matmuls(training_flops(config, 2, 50)), rel=0.01)


def test_adaptive_softmax_with_the_shares_of_its_tails():
    keys = {"hidden_size": 64, "adaptive_cutoffs": [32, 64], "adaptive_div_val": 2}
    config = S4Config(**SMALL | keys, use_cache=False)
    tokens = torch.tensor([[5, 40, 70, 90] * 16])  # targets: a quarter in cluster 0 and in tail 1, half in tail 2
    found = counted(S4ForCausalLM(config), input_ids=tokens, labels=tokens)
    assert matmuls(training_flops(config, 1, 64, tail_shares=(1 / 4, 1 / 2))) == pytest.approx(found, rel=0.01)
    assert matmuls(training_flops(config, 1, 64)) > found


def test_classification_reads_from_both_ends():
    keys = {"input_size": 3, "num_labels": 7, "bidirectional": True, "tie_word_embeddings": False}
    for ssm in ("s4", "s5"):
        config = S4Config(**SMALL | keys | {"ssm": ssm, "mode": "chunk"})
        inputs = {"inputs_embeds": torch.randn(2, 50, 3), "labels": torch.tensor([1, 2])}
        found = counted(S4ForSequenceClassification(config), **inputs)
        parts = training_flops(config, 2, 50, task="classification")
        assert matmuls(parts) == pytest.approx(found, rel=0.01)


def test_operators_do_not_depend_on_the_batch():
    config = S4Config(**SMALL, ssm="s4")

    def operators(*shape):
        return next(p for p in training_flops(config, *shape) if p.name == "operators").model

    assert operators(1, 64) == operators(8, 64) == operators(1, 640)


def test_model_flops_leave_out_what_is_recomputed():
    config = S4Config(**SMALL, ssm="s4")
    plain, again = (training_flops(config, 1, 64, checkpointing=on) for on in (False, True))
    assert total(plain) == total(again)
    assert total(again, "hardware") > total(plain, "hardware") > total(plain)
