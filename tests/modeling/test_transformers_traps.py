"""What goes wrong silently for model classes outside of transformers, and must not here."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MIXTURE, SIZES, tiny_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, default_data_collator

from ssm_lm import S4ForCausalLM, S4ForSequenceClassification
from ssm_lm.config.arguments import S4TrainingArguments
from ssm_lm.modeling.ssm import StateSpace
from ssm_lm.training.trainer import S4Trainer

VARIANTS = [{}, {"ssm": "s4d", "arch": MIXTURE}, {"ssm": "s5"}, {"adaptive_cutoffs": [20, 40]}, {"loss_chunk_size": 8}]

build = tiny_model


class Rows(Dataset):
    """Four rows of 12 tokens, the first labels of which count for nothing."""

    def __init__(self):
        self.ids = torch.randint(1, 60, (4, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index].masked_fill(torch.arange(12) < 3, -100)}


def trainer(model, folder, cls=Trainer, **kw):
    arguments = {"output_dir": str(folder), "report_to": [], "use_cpu": True, "per_device_train_batch_size": 2} | kw
    rows = Rows()
    return cls(
        model=model,
        args=(TrainingArguments if cls is Trainer else S4TrainingArguments)(
            disable_tqdm=True, save_strategy="no", **arguments
        ),
        train_dataset=rows,
        data_collator=default_data_collator,
    )


def smoothed(logits, labels, epsilon):
    """Label smoothing of the next token, by torch."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=epsilon
    )


# ---- label smoothing: the Trainer forgets to shift the labels of a class whose name it does not know


@pytest.mark.parametrize("cls", [Trainer, S4Trainer])
@pytest.mark.parametrize("kw", VARIANTS, ids=str)
def test_label_smoothing_shifts_the_labels(cls, kw, tmp_path):
    model = build(**kw).train()
    subject = trainer(model, tmp_path, cls, label_smoothing_factor=0.1)
    batch = default_data_collator([Rows()[i] for i in range(4)])
    with torch.no_grad():
        loss = subject.compute_loss(model, dict(batch))
        logits = model(batch["input_ids"]).logits
    torch.testing.assert_close(loss, smoothed(logits, batch["labels"], 0.1))


# ---- the meta device: what a checkpoint does not hold comes back as whatever was in memory


@pytest.mark.parametrize("cls", [S4ForCausalLM, S4ForSequenceClassification])
@pytest.mark.parametrize("kw", VARIANTS[:4], ids=str)
def test_loading_brings_back_every_parameter_and_buffer(cls, kw, tmp_path):
    model = build(cls, **kw)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the initialisation, which loading could fall back to
            parameter.mul_(1.25)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    for kind in ("named_parameters", "named_buffers"):
        before, after = dict(getattr(model, kind)()), dict(getattr(loaded, kind)())
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert torch.equal(after[name], value), name
            assert after[name].requires_grad == value.requires_grad, name


@pytest.mark.parametrize("kw", VARIANTS[:3], ids=str)
def test_what_is_missing_in_a_checkpoint_is_initialised(kw, tmp_path):
    model = build(**kw, dt_min=0.01, dt_max=0.02)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not re.search(r"layers.0.*\.(ssm|conv)\.", name)}
    assert 0 < len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = S4ForCausalLM.from_pretrained(tmp_path)
    spaces = [module for module in loaded.modules() if isinstance(module, StateSpace)]
    for space in spaces:
        assert ((0.0099 < space.log_dt.exp()) & (space.log_dt.exp() < 0.0201)).all()
        fixed = ("Lambda_log_re", "Lambda_im") if space.name != "s5" else ("Lambda_im",)
        for name in fixed:
            torch.testing.assert_close(getattr(space, name), space.initial_values()[name].float())
    for name, value in loaded.named_parameters():
        assert torch.isfinite(value).all()
        if name in kept:  # and what was there is as it was
            assert torch.equal(value, kept[name]), name


def test_a_second_initialisation_leaves_loaded_parameters_alone(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = S4ForCausalLM.from_pretrained(tmp_path)
    loaded.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


# ---- weight decay


@pytest.mark.parametrize("kw", VARIANTS[:3], ids=str)
def test_no_weight_decay_names_the_state_spaces(kw):
    model = build(**kw)
    names = {name for name, _ in model.named_parameters() if ".ssm." in name}
    assert model.no_weight_decay() == names
    assert len(names) >= 12


class GentleTrainer(Trainer):
    """The recipe of the README."""

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if name not in model.no_weight_decay()]


@pytest.mark.parametrize(("cls", "decays"), [(Trainer, True), (GentleTrainer, False)])
def test_weight_decay_in_a_stock_trainer(cls, decays, tmp_path):
    """The stock Trainer would decay dt and Lambda: the first case says that the recipe is still needed."""
    model = build()
    subject = trainer(model, tmp_path, cls, weight_decay=0.5)
    decayed, plain = subject.create_optimizer().param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    ids = {id(parameter) for parameter in decayed["params"]}
    spaces = [p for module in model.modules() if isinstance(module, StateSpace) for p in module.parameters()]
    assert {id(p) in ids for p in spaces} == {decays}
    assert id(model.model.embed_tokens.weight) in ids
    assert not any(id(p) in ids for name, p in model.named_parameters() if "norm" in name or "bias" in name)


# ---- trust_remote_code: the classes of an exported folder, in a process that has never seen ssm_lm

REMOTE = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import Trainer, TrainingArguments

lm, classifier, output = sys.argv[1:4]
ids = torch.arange(1, 13).view(2, 6)
results = {}

model = AutoModelForCausalLM.from_pretrained(lm, trust_remote_code=True).train()
arguments = TrainingArguments(output_dir=output, report_to=[], use_cpu=True, label_smoothing_factor=0.1)
trainer = Trainer(model=model, args=arguments)
with torch.no_grad():
    results["smoothed"] = trainer.compute_loss(model, {"input_ids": ids, "labels": ids}).item()
results["no_weight_decay"] = sorted(model.no_weight_decay())

# the config that AutoConfig makes is of another class than the one that the model's module has imported
config = AutoConfig.from_pretrained(lm, trust_remote_code=True)
results["classes_differ"] = type(config) is not sys.modules[type(model).__module__].S4Config
config.num_hidden_layers = 1
results["from_config"] = AutoModelForCausalLM.from_config(config, trust_remote_code=True).num_parameters()
config = AutoConfig.from_pretrained(lm, trust_remote_code=True)
again = AutoModelForCausalLM.from_pretrained(lm, config=config, trust_remote_code=True)
with torch.no_grad():
    results["logits"] = again.eval()(ids).logits.tolist()
results["generated"] = again.generate(ids, max_new_tokens=4, do_sample=False).tolist()

model = AutoModelForSequenceClassification.from_pretrained(classifier, trust_remote_code=True).eval()
results["classes"] = model(ids).logits.tolist()
model.save_pretrained(output)
again = AutoModelForSequenceClassification.from_pretrained(output, trust_remote_code=True).eval()
results["classes_again"] = again(ids).logits.tolist()
print(json.dumps(results))
"""


@pytest.mark.slow
def test_remote_code(tmp_path):
    """Saved with register_for_auto_class, loaded elsewhere: language model, classifier, and the traps above."""
    program = f"""
import sys
from ssm_lm import S4Config, S4ForCausalLM, S4ForSequenceClassification
import torch
S4Config.register_for_auto_class()
S4ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
S4ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
for cls, folder, arch in (
    (S4ForCausalLM, sys.argv[1], {MIXTURE!r}), (S4ForSequenceClassification, sys.argv[2], "s4")
):
    torch.manual_seed(0)
    cls(S4Config(num_labels=3, eos_token_id=None, arch=arch, **{SIZES!r})).save_pretrained(folder)
"""
    folders = [str(tmp_path / name) for name in ("lm", "classifier", "again")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", program, *folders[:2]], check=True, timeout=600, env=environment)
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", "import sys; sys.modules['ssm_lm'] = None\n" + REMOTE, *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])

    ids = torch.arange(1, 13).view(2, 6)
    model = S4ForCausalLM.from_pretrained(folders[0])
    with torch.no_grad():
        logits = model(ids).logits
        assert results["logits"] == logits.tolist()
        assert results["smoothed"] == pytest.approx(smoothed(logits, ids, 0.1).item(), rel=1e-5)
        classes = S4ForSequenceClassification.from_pretrained(folders[1])(ids).logits
    assert results["generated"] == model.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    assert results["no_weight_decay"] == sorted(model.no_weight_decay())
    assert results["classes_differ"]
    assert 0 < results["from_config"] < model.num_parameters()
    assert results["classes"] == results["classes_again"] == classes.tolist()
