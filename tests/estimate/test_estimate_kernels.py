"""What a GPU would run is counted by the decision that the layers make there, for a GPU that is not here."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.activations import GELUActivation

from ssm_lm import S4Config
from ssm_lm.config.reading import read_train_config
from ssm_lm.costs.flops import on_paper, total, training_execution, training_flops
from ssm_lm.estimate.kernels import STAND_INS
from ssm_lm.estimate.memory import count_pieces
from ssm_lm.estimate.trace import trace
from ssm_lm.modeling.kernel_launch import assume
from ssm_lm.modeling.mixers import make_state_space
from ssm_lm.modeling.ssm import S4, S4D, S5, SSD

REPO = Path(__file__).parents[2]
SIZES = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 32, "arch": "ssm"}


def on(architecture, **keys):
    config = S4Config(**SIZES | keys)
    return config, {"runs": on_paper(config, architecture), "architecture": architecture}


@pytest.mark.parametrize(
    ("architecture", "keys", "expected"),
    [
        ("sm_90", {"ssm": "s4d"}, ("chunk", True, 32)),  # on a CPU: fft
        ("gfx942", {"ssm": "s4d"}, ("chunk", True, 32)),
        ("sm_70", {"ssm": "s4d"}, ("fft", False, 64)),  # older than the kernels
        ("sm_90", {"ssm": "s4d", "kernels": "torch"}, ("fft", False, 64)),
        ("sm_90", {"ssm": "s4"}, ("chunk", True, 32)),
        ("sm_90", {"ssm": "s4", "state_size": 128}, ("chunk", True, 16)),
        ("sm_89", {"ssm": "s4", "state_size": 128}, ("chunk", False, 64)),  # too little shared memory
        ("sm_90", {"ssm": "s5"}, ("chunk", True, 32)),
    ],
)
def test_the_layers_own_decision(architecture, keys, expected):
    config, rule = on(architecture, **keys)
    execution = training_execution(config, 1024, False, **rule)
    assert (execution.mode, execution.kernel, execution.chunk_size) == expected


def test_flops_of_the_chunk_scan_where_a_cpu_takes_the_fft():
    config, rule = on("sm_90", ssm="s4d")
    scan = next(part for part in training_flops(config, 8, 1000, **rule) if part.name == "scan")
    # 32 chunks of 32 tokens a sequence, the last one padded: a Toeplitz product, inject and emit
    assert scan.forward == 8 * 32 * 64 * (2 * 32 * 32 + 2 * 2 * 32 * 32)
    assert total(training_flops(config, 8, 1000, **rule)) > total(training_flops(config, 8, 1000))


def test_the_kernel_of_s5_multiplies_no_matrices():
    config, rule = on("sm_90", ssm="s5")
    scan = next(part for part in training_flops(config, 2, 100, **rule) if part.name == "scan")
    assert (scan.forward, scan.backward, scan.other) == (0, 0, 20 * 200 * 32)


def test_a_gpu_moves_less_than_pytorch_would():
    config = S4Config(**SIZES, ssm="s4d")
    kernel, plain = (count_pieces(config, 8, 2048, architecture=name).block[0] for name in ("sm_90", "sm_70"))
    assert kernel.forward_traffic < 0.7 * plain.forward_traffic
    assert kernel.backward_traffic < 0.7 * plain.backward_traffic


class Output(torch.nn.Module):
    """A layer's output alone."""

    def __init__(self, layer, activation):
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, u):
        return self.layer(u, output_final_state=False, activation=self.activation)[0]


def test_a_step_of_the_recipe_scans_in_bfloat16():
    """`bf16: true` is autocast, and a norm before the scan returns float32: the kernel is launched on bfloat16, and 8
    bytes a token and channel stay for the backward (signal, states, y before and after its activation), not 20.
    """
    values = read_train_config(str(REPO / "configs" / "train" / "wikitext103.yaml"), {})
    assert values["bf16"]
    config, length = S4Config(**values["model"]), values["sequence_length"]
    _, rule = on("sm_90")
    assert training_execution(config, length, False, **rule, dtype=torch.bfloat16).chunk_size == 64
    launched, plain = [], STAND_INS["chunk_scan"]

    def forward(u, *rest):
        launched.append(u.dtype)
        return plain.forward(u, *rest)

    with assume("sm_90", {"chunk_scan": plain._replace(forward=forward)}), FakeTensorMode():
        layer = Output(make_state_space(config), GELUActivation())
        u = torch.empty(values["per_device_train_batch_size"], length, config.hidden_size, requires_grad=True)
        kept = [trace(layer, [u], autocast).kept / u.numel() for autocast in (torch.bfloat16, None)]
    assert launched == [torch.bfloat16, torch.float32]
    assert kept == [pytest.approx(8, abs=0.05), pytest.approx(20, abs=0.05)]


def test_a_step_of_an_ssd_scans_in_bfloat16():
    """The default block under autocast: values, write and read vectors reach the kernel in it, steps in float64."""
    config, launched = S4Config(**SIZES | {"ssm": "ssd", "arch": ["gated", "swiglu"]}), []

    def scan(v, b, c, dt, *rest):
        launched.append([x.dtype for x in (v, b, c, dt)])
        return STAND_INS["ssd_scan"](v, b, c, dt, *rest)

    with assume("sm_90", {"ssd_scan": scan}), FakeTensorMode():
        layer = Output(make_state_space(config), None)
        u = torch.empty(2, 100, layer.layer.input_size, requires_grad=True)
        for autocast in (torch.bfloat16, None):
            trace(layer, [u], autocast)
    assert launched == [[dtype] * 3 + [torch.float64] for dtype in (torch.bfloat16, torch.float32)]


@pytest.fixture
def opened_ssd_scan(monkeypatch):
    """The kernel's function of ssd, made of its launches but for these, so that the buffers between them are seen."""
    from ssm_lm.modeling import triton_ssd_scan as module

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = module.run_forward(*inputs)
            module.save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *gradients):
            return module.backward(ctx, *gradients, run=module.run_backward)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: None

    for name in ("ends_kernel", "carry_kernel", "emit_kernel", "vectors_kernel"):
        monkeypatch.setattr(module, name, Kernel())
    monkeypatch.setattr(module, "ssd_scan_chunks", Scan.apply)
    return module.ssd_scan


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("activation", [None, torch.nn.SiLU()], ids=["plain", "silu"])
@pytest.mark.parametrize("layer_class", [S4, S4D, S5, SSD])
@pytest.mark.parametrize("length", [96, 50])
def test_a_stand_in_holds_what_its_kernel_holds(layer_class, activation, length, opened_ssd_scan):
    """The kernels' operators say on tensors without data what they would allocate."""
    from ssm_lm.modeling.triton_chunk_scan import FUSED
    from ssm_lm.modeling.triton_s5_scan import s5_scan

    found = []
    for kernels in ({"chunk_scan": FUSED, "s5_scan": s5_scan, "ssd_scan": opened_ssd_scan}, STAND_INS):
        with assume("sm_90", kernels), FakeTensorMode():
            layer = layer_class(16, 8)
            u = torch.empty(3, length, layer.input_size, requires_grad=True)
            found.append(trace(Output(layer, activation), [u], None))
    ours, theirs = found[1], found[0]
    assert ours.kept == pytest.approx(theirs.kept, rel=0.01)
    assert ours.gradients == theirs.gradients
    assert ours.forward_peak == pytest.approx(theirs.forward_peak, rel=0.1)
    assert ours.backward_peak == pytest.approx(theirs.backward_peak, rel=0.1)
