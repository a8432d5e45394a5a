"""`ssm-lm estimate`, from a config to its report, and the scaling model."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from ssm_lm import S4Config
from ssm_lm.cli import main
from ssm_lm.costs.devices import DEVICES, known_device
from ssm_lm.estimate.scaling import Assumptions, Network, state_exchange, step_time, volumes

REPO = Path(__file__).parents[2]
CONFIG = {
    "model": {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "chunk_size": 16},
    "data": "not/there",
    "output_dir": "out",
    "sequence_length": 64,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_steps": 100,
    "bf16": True,
    "deepspeed": str(REPO / "configs" / "deepspeed" / "zero2.json"),
}


@pytest.fixture
def config(tmp_path):
    def write(**overrides):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(CONFIG | overrides))
        return str(path)

    return write


def test_the_windows_of_a_step_may_be_given_for_all_ranks(config, tmp_path, capsys):
    target = tmp_path / "report.json"
    values = {"gradient_accumulation_steps": 1, "train_batch_size_total": 48, "bf16": False, "deepspeed": None}
    arguments = ["--nodes", "2", "--gpus", "4", "--json", str(target)]
    assert main(["estimate", config(**values), *arguments]) == 0
    run = json.loads(target.read_text())["run"]
    assert (run["gradient_accumulation_steps"], run["sequences_per_step"]) == (3, 48)
    assert main(["estimate", config(**values | {"train_batch_size_total": 40}), *arguments]) == 2
    assert "train_batch_size_total 40 is no multiple of the 16 sequences that 8 ranks" in capsys.readouterr().err


def test_report(config, tmp_path, capsys):
    target = tmp_path / "report.json"
    arguments = ["--nodes", "2", "--gpus", "4", "--device", "a100", "--scaling", "--json", str(target)]
    assert main(["estimate", config(), *arguments]) == 0
    report = json.loads(target.read_text())
    text = capsys.readouterr().out
    assert f"{report['model']['parameters']:,} parameters" in text
    assert "assumed" in text
    run, time = report["run"], report["time"]
    assert run["sequences_per_step"] == 2 * 3 * 8
    assert run["tokens_per_step"] == 2 * 3 * 8 * 64
    assert time["tokens"] == 100 * run["tokens_per_step"]
    assert time["days"] == pytest.approx(100 * time["step"] / 86400)
    assert run["zero_stage"] == 2
    assert len(report["memory"]) == 10
    here = [row for row in report["memory"] if row["stage"] == 2 and not row["activation_checkpointing"]]
    assert here[0]["total"] == report["memory_as_configured"]["total"]
    parts = report["flops_per_token"]["parts"]
    assert report["flops_per_token"]["model"] == pytest.approx(
        sum(p["forward"] + p["backward"] + p["other"] for p in parts)
    )
    assert [row["ranks"] for row in report["scaling"] if row["stage"] == 3] == [8 * 2**k for k in range(10)]
    assert all(0 < row["scaling_efficiency"] <= 1 for row in report["scaling"])


def test_a_measured_share_of_the_roofline_is_taken(config, tmp_path, capsys):
    measured, target = tmp_path / "gpu.json", tmp_path / "report.json"
    measured.write_text(json.dumps({"share_of_roofline": {"device": "h200", "share": 0.25}}))
    assert main(["estimate", config(), "--measured", str(measured), "--json", str(target)]) == 0
    assumed = json.loads(target.read_text())["assumptions"]
    assert (assumed["efficiency"], assumed["measured"]) == (0.25, "h200")
    assert "25% of the roofline is reached, as measured on h200;" in capsys.readouterr().out
    measured.write_text(json.dumps({"share_of_roofline": {"device": "h200", "share": 25}}))
    assert main(["estimate", config(), "--measured", str(measured)]) == 2
    assert "its share of the roofline is 25; give one between 0 and 1" in capsys.readouterr().err


def test_a_small_model_waits_for_the_host():
    """1,000 launches of 6 us on a GPU that needs a millisecond."""
    keys = {"stage": None, "accumulation": 3}
    of_host, of_gpu = (
        step_time(1, 10, micro_batch, DEVICES["h100"], Network(), Assumptions(0.5), launched=1000, **keys).compute
        for micro_batch in (0.0005, 0.01)
    )
    assert (of_host, of_gpu) == (pytest.approx(3 * 0.006), pytest.approx(3 * 0.02))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "--device abacus is not known"),
        (["--nodes", "0"], "--nodes must be positive"),
        (["--efficiency", "1.5"], "--efficiency is a share"),
        (["--measured", "/nowhere/gpu.json"], "--measured /nowhere/gpu.json: No such file"),
        (["--measured", str(REPO / "mkdocs.yml")], "holds no share_of_roofline"),
        (["--measured", "x", "--efficiency", "0.3"], "give one"),
        (["--plot", "x.svg"], "--plot draws what --scaling computes"),
        (["--scaling", "--plot", "x.gif"], "ends in .svg or .png"),
        (["--sequence-ranks", "3"], "must divide the 8 GPUs"),
        (["--set", "hidden=3"], "unknown key 'hidden'"),
        (["--set", "model.state_size=3"], "state_size must be even"),
        (["--set", "model.vocab_size=null"], "vocab_size"),
        (["--json", "/nowhere/at/all.json"], "cannot write"),
    ],
)
def test_bad_input_is_one_line(config, capsys, arguments, message):
    assert main(["estimate", config(), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_vocabulary_must_be_known(config, capsys):
    model = {key: value for key, value in CONFIG["model"].items() if key != "vocab_size"}
    assert main(["estimate", config(model=model)]) == 2
    assert "--set model.vocab_size=N" in capsys.readouterr().err


def test_plot(config, tmp_path, capsys):
    target = tmp_path / "scaling.svg"
    code = main(["estimate", config(), "--scaling", "--plot", str(target)])
    if importlib.util.find_spec("matplotlib") is None:
        assert code == 2
        assert "ssm_lm[plot]" in capsys.readouterr().err
    else:
        assert code == 0
        assert "<svg" in target.read_text()


def test_volumes_of_the_stages():
    v = 4 * 1000 * 7 / 8
    assert volumes(1000, 8, None, 5) == volumes(1000, 8, 0, 5) == (2 * v, 0)
    assert volumes(1000, 8, 1, 5) == (v, v)
    assert volumes(1000, 8, 2, 5) == (5 * v, v)
    assert volumes(1000, 8, 3, 5) == (15 * v, 0)
    assert volumes(1000, 1, 3, 5) == (0, 0)


def test_state_exchange_is_the_states_of_the_others():
    keys = {"hidden_size": 1024, "num_hidden_layers": 3, "state_size": 64}
    assert state_exchange(S4Config(**keys), 2, 8) == (4 * 2 * 1024 * 64 * 7, 2 * 3 * 2)
    assert state_exchange(S4Config(**keys, ssm="s5"), 2, 8)[0] == 4 * 2 * 64 * 7
    tail, state = 3 * 3 * 1024, 1024 * 64
    assert state_exchange(S4Config(**keys, arch="h3"), 2, 8) == (4 * 2 * (tail + state) // 2 * 7, 2 * 3 * 2)


def test_step_time():
    """By hand: 10^9 parameters, stage 0, 16 ranks on 2 nodes of 8, a tenth of a second of roofline."""
    network = Network(intra=400e9, inter=10e9, latency=0.0)
    device = DEVICES["h100"]
    found = step_time(16, 10**9, 0.1, device, network, Assumptions(0.5, 0.6), stage=0)
    assert found.compute == pytest.approx(0.2)
    assert found.optimizer == pytest.approx(28e9 / 3.35e12 / 0.5)
    assert found.communication == pytest.approx(2 * 4e9 * 15 / 16 / 80e9)
    assert found.exposed == pytest.approx(found.communication - 0.6 * 0.2 * 2 / 3)
    assert found.step == pytest.approx(found.compute + found.optimizer + found.exposed)
    within = step_time(8, 10**9, 0.1, device, network, Assumptions(0.5, 0.6), stage=0)
    assert within.communication == pytest.approx(2 * 4e9 * 7 / 8 / 400e9)
    assert within.exposed == 0


def test_devices_by_their_drivers_names():
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A100-PCIE-40GB": "a100-40gb",
        "NVIDIA L40S": "l40s",
        "NVIDIA L4": "l4",
        "NVIDIA A10": "a10",
        "NVIDIA GeForce RTX 4090": "rtx-4090",
        "AMD Instinct MI300X": "mi300x",
        "Tesla V100-SXM2-32GB": "v100",
    }
    assert {name: known_device(name).name for name in names} == names
    assert known_device("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert DEVICES["v100"].peak("bf16") == DEVICES["v100"].fp32
