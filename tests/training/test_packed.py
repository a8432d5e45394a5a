"""`pack_documents`: a window's documents are to the model what they would be alone."""

from itertools import pairwise

import pytest
import torch

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.cli import main
from ssm_lm.data.stream import TokenStream
from ssm_lm.data.windows import TokenWindows


def test_the_loss_of_a_window_is_that_of_its_documents_apart(corpus):
    """Each begins with the end-of-text token before it; the last token of a document predicts the one that ends it."""
    stream = TokenStream.open(corpus, "train")
    window = TokenWindows(stream, 60, pack_documents=True)[7]
    ids = window["input_ids"]
    begins = [0, *(i for i in range(1, 60) if ids[i] == stream.eos_token_id), 60]
    assert len(begins) > 4
    torch.manual_seed(0)
    config = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "ssm": "s4", "chunk_size": 8, "arch": "h3"}
    model = S4ForCausalLM(S4Config(vocab_size=stream.vocab_size, **config)).double()
    packed = model(**{key: value[None] for key, value in window.items()}).loss
    nll = 0.0
    for begin, end in pairwise(begins):
        logits = model(input_ids=ids[None, begin:end]).logits[0].log_softmax(-1)
        targets = ids[begin + 1 : end + 1]
        nll -= logits[: len(targets)].gather(-1, targets[:, None]).sum()
    assert packed.item() == pytest.approx(nll.item() / 59, rel=1e-6)
    plain = model(input_ids=ids[None], labels=ids[None]).loss
    assert abs(packed.item() - plain.item()) > 1e-4


def test_a_run_packs_and_another_run_does_not(write_config, tmp_path, capsys):
    keys = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    assert main(["train", write_config(pack_documents=True, **keys)]) == 0
    assert "documents packed" in capsys.readouterr().out
    assert main(["train", write_config(**keys)]) == 2
    assert "pack_documents is True, not False" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key", [{"carry_state": True}, {"model": {"type": "llama", "hidden_size": 16}}, {"task": "digits", "data": None}]
)
def test_what_it_does_not_go_with(write_config, capsys, key):
    assert main(["train", write_config(pack_documents=True, **key)]) == 2
    assert "pack_documents" in capsys.readouterr().err
