"""Training in this process, without a launcher: the curve, resuming, what a folder holds."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from harness import losses
from safetensors.torch import load_file

from ssm_lm import S4ForCausalLM
from ssm_lm.cli import main
from ssm_lm.data.stream import TokenStream
from ssm_lm.training.trainer import RunSampler

GOLDEN = Path(__file__).with_name("golden_losses.json")


@pytest.mark.parametrize("ssm", ["s4", "s4d"])
def test_golden_losses(write_config, tmp_path, ssm):
    """20 steps give the curve that is under version control. A change of it is a change of the model or the data order:
    explain it in the commit that writes the file anew."""
    assert main(["train", write_config(**{"model": golden_model(ssm)})]) == 0
    ours = losses(tmp_path / "run")
    golden = json.loads(GOLDEN.read_text())[ssm]
    assert len(ours) == len(golden) == 20
    assert ours == pytest.approx(golden, rel=1e-4)
    assert ours[-1] < ours[0] - 0.5


def golden_model(ssm):
    return {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "ssm": ssm, "chunk_size": 16}


def test_a_dry_run_plans_for_the_ranks_of_the_launcher(write_config, tmp_path, capsys, monkeypatch):
    config = write_config(max_steps=3)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main(["train", config, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "32 windows of 40 = 1,280 tokens (8 ranks x 4 x 1 accumulated), 3 steps" in out
    assert not (tmp_path / "run").exists()
    monkeypatch.delenv("WORLD_SIZE")
    assert main(["train", config]) == 0  # in the same process, and alone again
    assert "(1 ranks x 4 x 1 accumulated)" in capsys.readouterr().out


def test_a_finished_run_is_left_alone(write_config, tmp_path, capsys):
    config = write_config(max_steps=3)
    assert main(["train", config]) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    assert main(["train", config]) == 0
    assert "finished (3 steps)" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_a_run_goes_on_from_its_last_whole_checkpoint(write_config, tmp_path):
    straight = write_config("straight", max_steps=12, save_strategy="steps", save_steps=4)
    assert main(["train", straight]) == 0
    # the same run, cut off: the last checkpoint has no mark, as after a kill in the middle of writing it
    broken = write_config("broken", max_steps=12, save_strategy="steps", save_steps=4)
    assert main(["train", broken]) == 0
    folder = tmp_path / "broken"
    (folder / "checkpoint-12" / "complete.json").unlink()
    (folder / "checkpoint-12" / "model.safetensors").write_bytes(b"half")
    record = json.loads((folder / "run.json").read_text())
    del record["finished_step"]
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "model.safetensors").unlink()
    assert main(["train", broken]) == 0
    assert losses(folder) == losses(tmp_path / "straight")
    ours, theirs = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "straight"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_lines_are_printed_without_a_bar(write_config, capfd):
    """Into a file, too: no carriage return, a line a log entry; and no word of reports that are not written."""
    assert main(["train", write_config(max_steps=3, disable_tqdm=False, eval_strategy="steps", eval_steps=3)]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines if "  loss " in line] == ["step 1/3", "step 2/3", "step 3/3"]
    assert any(line.startswith("step 3/3  validation loss ") for line in lines)
    assert "\r" not in out + err
    assert "tensorboard" not in out


def test_fewer_steps_than_a_run_has_taken_are_said(write_config, tmp_path, capsys):
    keys = {"save_strategy": "steps", "save_steps": 2}
    assert main(["train", write_config(max_steps=4, **keys)]) == 0
    run_file = tmp_path / "run" / "run.json"
    record = json.loads(run_file.read_text())
    del record["finished_step"]  # as if it had been killed while it wrote the model
    run_file.write_text(json.dumps(record))
    capsys.readouterr()
    assert main(["train", write_config(max_steps=3, **keys)]) == 0
    assert "it is of step 4, and max_steps is 3: no step is taken" in capsys.readouterr().out


def test_another_run_in_the_folder_is_refused(write_config, tmp_path, capsys):
    assert main(["train", write_config(max_steps=2)]) == 0
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    capsys.readouterr()
    for overrides, message in (
        ({"model": golden_model("s4d")}, "model."),
        ({"seed": 9}, "seed is 1, not 9"),
    ):
        assert main(["train", write_config(max_steps=2, **overrides)]) == 2
        error = capsys.readouterr().err
        assert "holds another run" in error
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_folder_of_something_else_is_refused(write_config, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert main(["train", write_config()]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_checkpoint_that_cannot_be_resumed_is_refused(write_config, tmp_path, capsys):
    config = write_config(max_steps=4, save_strategy="steps", save_steps=2)
    assert main(["train", config, "--resume_from_checkpoint", str(tmp_path / "nowhere")]) == 2
    assert "no whole checkpoint" in capsys.readouterr().err
    assert main(["train", config]) == 0
    checkpoint = tmp_path / "run" / "checkpoint-4"
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["train", config, "--resume_from_checkpoint", str(checkpoint)]) == 2
    assert "no whole checkpoint" in capsys.readouterr().err


def test_going_back_in_a_folder_with_later_checkpoints_is_refused(write_config, tmp_path, capsys):
    config = write_config(max_steps=4, save_strategy="steps", save_steps=2)
    assert main(["train", config]) == 0
    earlier = str(tmp_path / "run" / "checkpoint-2")
    assert main(["train", config, "--max_steps", "6", "--resume_from_checkpoint", earlier]) == 2
    assert "holds checkpoint-4, which is later" in capsys.readouterr().err
    elsewhere = ["--max_steps", "4", "--resume_from_checkpoint", earlier, "--output_dir", str(tmp_path / "branch")]
    assert main(["train", config, *elsewhere]) == 0
    assert losses(tmp_path / "branch") == losses(tmp_path / "run")
    assert main(["train", config, *elsewhere, "--seed", "9", "--output_dir", str(tmp_path / "other")]) == 2
    assert "is of another run (seed is 1, not 9)" in capsys.readouterr().err


def test_a_damaged_data_folder_is_one_line(corpus, write_config, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    (copy / "tokenizer" / "tokenizer.json").write_text("{")
    assert main(["train", write_config(data=str(copy))]) == 2
    (copy / "train.bin").write_bytes(b"short")
    assert main(["train", write_config(data=str(copy))]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "tokenizer" in lines[0]
    assert "train.bin" in lines[1]


def test_accumulating_gradients_changes_nothing(write_config, tmp_path):
    assert main(["train", write_config("whole", max_steps=6, per_device_train_batch_size=4)]) == 0
    accumulated = write_config("parts", max_steps=6, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert main(["train", accumulated]) == 0
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_tensorboard_evaluation_and_activation_checkpointing(write_config, tmp_path):
    config = write_config(
        max_steps=4, report_to=["tensorboard"], eval_strategy="steps", eval_steps=2, activation_checkpointing=True
    )
    assert main(["train", config]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "runs")).Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/tokens_per_second", "train/learning_rate", "eval/loss", "eval/perplexity"} <= set(tags)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_evaluation_is_of_the_plain_loss_where_training_smooths_the_labels(write_config, corpus, tmp_path):
    """The perplexity in the log is exp of it."""
    config = write_config(max_steps=2, label_smoothing_factor=0.2, eval_strategy="steps", eval_steps=2)
    assert main(["train", config]) == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    (found,) = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    tokens = torch.tensor(TokenStream.open(str(corpus), "validation").tokens[: 22 * 40].astype("int64")).view(22, 40)
    model = S4ForCausalLM.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        assert found == pytest.approx(model(input_ids=tokens, labels=tokens).loss.item(), rel=1e-4)


def test_fine_tuning_from_a_model(write_config, tmp_path):
    assert main(["train", write_config("first", max_steps=10)]) == 0
    second = write_config("second", max_steps=2, model={}, init_from=str(tmp_path / "first"), warmup_steps=0)
    assert main(["train", second]) == 0
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "first")[0] - 0.3


def test_fine_tuning_holds_float32_weights_whatever_the_file_holds(write_config, tmp_path):
    """At a small learning rate most steps are below the digits of bfloat16."""
    assert main(["train", write_config("first", max_steps=2)]) == 0
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "first", half, ignore=shutil.ignore_patterns("checkpoint-*", "run.json", "runs"))
    S4ForCausalLM.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    before = load_file(half / "model.safetensors")
    name = next(name for name in before if name.endswith("out_proj.weight"))
    assert before[name].dtype == torch.bfloat16
    keys = {"model": {}, "init_from": str(half), "learning_rate": 1e-5, "warmup_steps": 0}
    assert main(["train", write_config("second", max_steps=1, **keys)]) == 0
    after = load_file(tmp_path / "second" / "model.safetensors")
    assert after[name].dtype == torch.float32
    assert (after[name] != before[name].float()).float().mean() > 0.9
    assert json.loads((tmp_path / "second" / "config.json").read_text())["dtype"] == "float32"


def test_fine_tuning_on_data_of_another_tokenizer_is_refused(write_config, tmp_path, capsys):
    assert main(["train", write_config("first", max_steps=1)]) == 0
    path = tmp_path / "first" / "tokenizer.json"
    definition = json.loads(path.read_text())
    vocabulary = definition["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]  # of the same size
    path.write_text(json.dumps(definition))
    capsys.readouterr()
    assert main(["train", write_config("second", model={}, init_from=str(tmp_path / "first"))]) == 2
    assert "was prepared with another tokenizer than that of init_from" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


class TestRunSampler:
    class Windows:
        """Three windows an epoch."""

        def at(self, places):
            return 10 * (places // 3) + places % 3

    @pytest.mark.parametrize("total", [0, 2, 3, 7])
    def test_goes_through_epochs_until_the_run_is_full(self, total):
        sampler = RunSampler(self.Windows(), total)
        assert list(sampler) == [0, 1, 2, 10, 11, 12, 20][:total]
        assert list(sampler) == [0, 1, 2, 10, 11, 12, 20][:total]
        assert len(sampler) == total

    def test_begins_at_a_step_without_those_before_it(self):
        sampler = RunSampler(self.Windows(), 10**12, batch_size=4, passed_over=(1, 5))
        sampler.first_step = 10**11
        first = 4 * (10**11 + 2)
        assert next(iter(sampler)) == 10 * (first // 3) + first % 3


def test_training_holds_no_logits_and_evaluation_that_wants_them_does(write_config, tmp_path, monkeypatch):
    from ssm_lm.modeling.modeling_s4 import S4ForCausalLM

    seen, forward = [], S4ForCausalLM.forward

    def watched(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        seen.append((self.training, out.logits is None))
        return out

    # the signature is what the Trainer reads
    watched.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(S4ForCausalLM, "forward", watched)
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    assert main(["train", write_config(**settings)]) == 0
    assert set(seen) == {(True, True), (False, True)}
    seen.clear()
    assert main(["train", write_config("logits", **settings, prediction_loss_only=False)]) == 0
    assert set(seen) == {(True, True), (False, False)}


def test_an_adaptive_model_learns_and_resumes(write_config, tmp_path):
    adaptive = golden_model("s4") | {"adaptive_cutoffs": [8, 20], "adaptive_div_val": 2, "head_dropout": 0.1}
    settings = {"model": adaptive, "max_steps": 20, "eval_strategy": "steps", "eval_steps": 20}
    straight = write_config("straight", **settings)
    assert main(["train", straight]) == 0
    curve = losses(tmp_path / "straight")
    assert curve[-1] < curve[0] - 0.3
    weights = load_file(tmp_path / "straight" / "model.safetensors")
    assert "model.embed_tokens.projection_1" in weights
    assert "lm_head.projection_1" not in weights  # tied

    interrupted = write_config("interrupted", **settings, save_strategy="steps", save_steps=10)
    assert main(["train", interrupted]) == 0
    folder = tmp_path / "interrupted"
    record = json.loads((folder / "run.json").read_text())
    del record["finished_step"]
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "checkpoint-20" / "complete.json").unlink()
    assert main(["train", interrupted]) == 0
    assert losses(folder) == curve
