"""The state that goes on from window to window, in the model and through the Trainer."""

import json

import pytest
import torch
from harness import losses

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.cli import main
from ssm_lm.errors import UserError
from ssm_lm.training.carry import CarriedState, RowSampler


@pytest.mark.parametrize(("ssm", "arch"), [("s4", "s4"), ("s4d", "s4"), ("s4d", ["h3", "gated"])], ids=str)
def test_four_segments_equal_one_forward(ssm, arch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8}
    model = S4ForCausalLM(S4Config(**sizes, ssm=ssm, arch=arch))
    ids = torch.randint(0, 50, (2, 1024))
    carried = CarriedState(model.config, windows_per_row=10, batches_per_step=1)
    with torch.no_grad():
        whole = model(ids).logits
    model.train()
    parts = [model(part, past_key_values=carried.next_cache(), use_cache=True).logits for part in ids.split(256, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_the_gradient_goes_back_through_a_cache_and_stops_at_a_carried_one():
    torch.manual_seed(0)
    model = S4ForCausalLM(S4Config(vocab_size=50, hidden_size=8, num_hidden_layers=1, state_size=4)).double()
    embeds = torch.randn(1, 40, 8, dtype=torch.float64)

    def gradient(split):
        inputs = embeds.clone().requires_grad_()
        if split == "whole":
            out = model(inputs_embeds=inputs, use_cache=False).logits[:, 20:]
        else:
            carried = CarriedState(model.config, 10, 1)
            cache = carried.next_cache()
            model(inputs_embeds=inputs[:, :20], past_key_values=cache, use_cache=True)
            if split == "detached":
                cache = carried.next_cache()
            out = model(inputs_embeds=inputs[:, 20:], past_key_values=cache, use_cache=True).logits
        out.pow(2).sum().backward()
        return inputs.grad

    torch.testing.assert_close(gradient("through"), gradient("whole"))
    detached = gradient("detached")
    assert not detached[:, :20].any()
    assert detached[:, 20:].any()


def test_rows_go_on_where_they_stopped():
    sampler = RowSampler(tokens=25, sequence_length=4, rows=2, total=8)
    assert sampler.windows_per_row == 3
    assert list(sampler) == [0, 12, 4, 16, 8, 20, 0, 12]
    with pytest.raises(UserError, match="too few"):
        RowSampler(tokens=7, sequence_length=4, rows=2, total=8)


def test_the_state_is_dropped_where_rows_begin_again():
    config = S4Config(vocab_size=5, hidden_size=8, num_hidden_layers=1, state_size=4)
    carried = CarriedState(config, windows_per_row=2, batches_per_step=1)
    first = carried.next_cache()
    assert carried.next_cache() is first
    assert carried.next_cache() is not first


def test_training_carries_and_resumes(write_config, tmp_path):
    """Losses differ from those of training without the state, and a resumed run has those of an uninterrupted one."""
    settings = {
        "carry_state": True,
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "sequence_length": 16,
    }
    straight = write_config("straight", **settings)
    assert main(["train", straight]) == 0
    stopped = write_config("stopped", **settings)
    assert main(["train", stopped]) == 0
    folder = tmp_path / "stopped"
    (folder / "checkpoint-12" / "complete.json").unlink()
    assert (folder / "checkpoint-10" / "carried_state_0.safetensors").is_file()
    record = json.loads((folder / "run.json").read_text())
    del record["finished_step"]
    (folder / "run.json").write_text(json.dumps(record))
    assert main(["train", stopped]) == 0
    assert losses(folder) == losses(tmp_path / "straight")


def test_resuming_without_the_states_is_refused(write_config, tmp_path, capsys):
    settings = {"carry_state": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    config = write_config(**settings)
    assert main(["train", config]) == 0
    checkpoint = tmp_path / "run" / "checkpoint-4"
    (checkpoint / "carried_state_0.safetensors").unlink()
    resume = ["--max_steps", "6", "--resume_from_checkpoint", str(checkpoint)]
    assert main(["train", config, *resume]) == 2
    assert "no whole checkpoint" in capsys.readouterr().err
    # as other ranks would have written it: whole, with the states of others
    (checkpoint / "complete.json").write_text(json.dumps({"step": 4, "world_size": 1}))
    assert main(["train", config, *resume]) == 2
    assert "carried_state_0" in capsys.readouterr().err


def test_activation_checkpointing_is_refused(write_config, capsys):
    assert main(["train", write_config(carry_state=True, activation_checkpointing=True)]) == 2
    assert "exclude each other" in capsys.readouterr().err
