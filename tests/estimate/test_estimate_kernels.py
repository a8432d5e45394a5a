"""What a GPU would run is counted by the decision that the layers make there, for a GPU that is not here."""

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.activations import GELUActivation

from ssm_lm import S4Config
from ssm_lm.bench.compile import compile_cases
from ssm_lm.config.reading import read_train_config
from ssm_lm.costs.flops import on_paper, total, training_execution, training_flops
from ssm_lm.estimate import kernels
from ssm_lm.estimate.kernels import STAND_INS
from ssm_lm.estimate.memory import count_pieces, on_gpu
from ssm_lm.estimate.trace import StorageCounter, trace
from ssm_lm.modeling.kernel_launch import assume
from ssm_lm.modeling.mixers import make_state_space
from ssm_lm.modeling.norms_and_dropout import (
    LayerNorm,
    RMSNorm,
    add_dropped,
    after_activation,
    at_gated_end,
    gated_by_silu,
)
from ssm_lm.modeling.ops import CROSS_ENTROPY, gradient_in_rows
from ssm_lm.modeling.short_convolution import ShortConvolution
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

    def __init__(self, layer, activation, mode="auto"):
        super().__init__()
        self.layer, self.activation, self.mode = layer, activation, mode

    def forward(self, u):
        return self.layer(u, mode=self.mode, output_final_state=False, activation=self.activation)[0]


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


OPENED = "run_forward", "save", "backward", "run_backward"


def opened(monkeypatch, module, operation: str, *kernels: str, parts: tuple[str, ...] = OPENED) -> list[str]:
    """A kernel's operation, made of its launches but for these, so that the buffers between them are seen; the list of
    the kernels that it will have launched. parts: the names of its functions.
    """
    launched = []
    run_forward, save, backward, run_backward = (getattr(module, name) for name in parts)

    class Operation(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = run_forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *gradients):
            return backward(ctx, *gradients, run=run_backward)

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(self.name)

    for name in kernels:
        monkeypatch.setattr(module, name, Kernel(name))
    monkeypatch.setattr(module, operation, Operation.apply)
    return launched


def compare_with_launchers(operation: str, kernel, module, inputs: list, rows: list[str]):
    """What stands in for a kernel keeps, holds and moves what its launchers do, and the rows of the report say, forward
    and backward; a launch each, beside those of PyTorch's operators.
    """
    found = []
    for which in (kernel, STAND_INS[operation]):
        with assume("sm_90", STAND_INS | {operation: which}):
            for x in (*inputs, *module.parameters()):
                x.grad = None
            found.append(trace(module, inputs, torch.bfloat16))
    theirs, ours = found
    assert (ours.kept, ours.gradients) == (theirs.kept, theirs.gradients)
    assert ours.forward_peak == pytest.approx(theirs.forward_peak, rel=0.01)
    assert ours.backward_peak == pytest.approx(theirs.backward_peak, rel=0.01)
    ways = ours.forward_launches - theirs.forward_launches, ours.backward_launches - theirs.backward_launches
    assert ways == (1, 1)
    cases = {case["name"]: case["work"]["bytes"] for case in compile_cases("sm_90")}
    expected = [cases[row] for row in rows]
    assert [ours.forward_in_kernels, ours.backward_in_kernels] == pytest.approx(expected, rel=0.01)


@pytest.fixture
def opened_ssd_scan(monkeypatch):
    from ssm_lm.modeling import triton_ssd_scan as module
    from ssm_lm.modeling import triton_ssd_system as system

    opened(monkeypatch, module, "ssd_scan_chunks", "ends_kernel", "carry_kernel", "emit_kernel", "vectors_kernel")
    of_system = "norms_kernel", "norms_gradient_kernel", "turns_kernel", "turns_gradient_kernel"
    opened(monkeypatch, system, "make_vectors", *of_system)
    return {"ssd_scan": module.ssd_scan, "ssd_system": system.ssd_vectors}


@pytest.fixture
def opened_dplr_operators(monkeypatch):
    from ssm_lm.modeling import triton_dplr_operators as module

    names = "operators_kernel", "carry_gradient_kernel", "chain_gradient_kernel"
    return module.dplr_operators, opened(monkeypatch, module, "make_operators", *names)


@pytest.fixture
def opened_diagonal_operators(monkeypatch):
    from ssm_lm.modeling import triton_diagonal_operators as module

    launched = opened(monkeypatch, module, "make_operators", "power_kernel", "power_gradient_kernel")
    return module.diagonal_operators, launched


@pytest.fixture
def opened_diagonal_discretization(monkeypatch):
    from ssm_lm.modeling import triton_diagonal_discretization as module

    launched = opened(monkeypatch, module, "discretize", "zoh_kernel", "zoh_gradient_kernel")
    return module.diagonal_discretization, launched


@pytest.fixture
def opened_dplr_discretization(monkeypatch):
    from ssm_lm.modeling import triton_dplr_discretization as module

    launched = opened(monkeypatch, module, "discretize", "bilinear_kernel", "bilinear_gradient_kernel")
    return module.dplr_discretization, launched


@pytest.fixture
def opened_short_convolution(monkeypatch):
    from ssm_lm.modeling import triton_short_convolution as module

    launched = opened(monkeypatch, module, "convolve_tokens", "convolve_kernel", "convolve_backward_kernel")
    return module.short_convolution, launched


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# The report's rows of a layer of B = 8, L = 8192, H = 1024, N = 64 (S5: 1,024 states) in the mode, forward
# and backward. The gradient of a layer's output lies in rows already, and is not turned.
OF_CHUNKS = (
    "to rows bf16, training gelu {0} bf16 N=64 in segments",
    "reverse {0} bf16 N=64 in segments, gradients of operators bf16, from rows bf16",
)
ROWS = {
    (S4, "chunk"): ("chunk_scan", *(way.format("dense") for way in OF_CHUNKS)),
    (S4D, "chunk"): ("chunk_scan", *(way.format("diagonal") for way in OF_CHUNKS)),
    (S5, "chunk"): (
        "s5_scan",
        "ends forward bf16, carry, emit forward bf16",
        "ends reverse bf16, carry, emit reverse bf16",
    ),
    (SSD, "chunk"): (
        "ssd_scan",
        "ends forward fp32, carry forward, emit fp32",
        "ends reverse fp32, carry reverse, gradient of v fp32, gradient of c fp32, gradient of b fp32",
    ),
    (S4, "fft"): ("cauchy_forward rank 1", "", ""),
    (S4D, "fft"): ("vandermonde_forward", "", ""),
}


# and what makes the operators in float32, once more in the backward; or what the scan reads
OF_OPERATORS = {
    SSD: (
        "ssd_system vectors forward fp32, ssd_system turns",
        "ssd_system turns, ssd_system turns gradient, ssd_system vectors backward fp32",
    ),
    S4: (
        "dplr_discretization forward rank 1, dplr_operators forward rank 1",
        "dplr_discretization forward rank 1, dplr_operators forward rank 1, "
        "dplr_operators gradients of the carry rank 1, dplr_operators gradients of the chains rank 1, "
        "dplr_discretization backward rank 1",
    ),
    S4D: (
        "diagonal_discretization forward N=64, diagonal_operators forward N=64",
        "diagonal_discretization forward N=64, diagonal_operators forward N=64, "
        "diagonal_operators backward N=64, diagonal_discretization backward N=64",
    ),
}


def bytes_of_rows(layer_class, mode) -> list[float]:
    """Forward and backward: the sums of the report's rows, each the first whose name begins so."""
    found = {case["name"]: case["work"]["bytes"] for case in compile_cases("sm_90")}
    kernel, *ways = ROWS[layer_class, mode]
    if mode == "fft":  # the kernel is made of the system
        system = "dplr_discretization {} rank 1" if layer_class is S4 else "diagonal_discretization {} N=64"
        ways = "forward", "backward"
        return [found[kernel.replace("forward", way)] + found[system.format(way)] for way in ways]
    starts = [[f"{kernel} {row}" for row in way.split(", ")] for way in ways]
    for way, rows in zip(starts, OF_OPERATORS.get(layer_class, ()), strict=layer_class in OF_OPERATORS):
        way += rows.split(", ")
    return [sum(next(size for name, size in found.items() if name.startswith(row)) for row in way) for way in starts]


@needs_triton
@pytest.mark.parametrize(("layer_class", "mode"), ROWS, ids=lambda x: getattr(x, "__name__", x))
def test_a_kernel_moves_what_its_report_says(layer_class, mode):
    low = layer_class in (S4, S4D, S5) and mode == "chunk"
    with assume("sm_90", STAND_INS), FakeTensorMode():
        layer = layer_class(1024, 1024 if layer_class is S5 else 64)
        u = torch.empty(8, 8192, layer.input_size, requires_grad=True)
        found = trace(Output(layer, GELUActivation(), mode), [u], torch.bfloat16 if low else None)
    moved = [found.forward_in_kernels, found.backward_in_kernels]
    assert moved == pytest.approx(bytes_of_rows(layer_class, mode), rel=0.01)


@needs_triton
def test_the_recipe_is_counted_by_the_rows_of_the_report():
    """On an H100, with the eight windows of the report."""
    values = read_train_config(str(REPO / "configs" / "train" / "wikitext103.yaml"), {})
    config = S4Config(**values["model"] | {"vocab_size": 1000, "adaptive_cutoffs": None, "head_dropout": 0.0})
    pieces = count_pieces(config, 8, values["sequence_length"], autocast=torch.bfloat16, architecture="sm_90")
    ssm = pieces.block[pieces.kinds.index("ssm")]
    moved = [ssm.forward_in_kernels, ssm.backward_in_kernels]
    found = {case["name"]: case["work"]["bytes"] for case in compile_cases("sm_90")}
    # the activation goes with the dropout that follows it, and not with the scan
    training = (found[f"chunk_scan training {way}dense bf16 N=64 in segments w4s4"] for way in ("", "gelu "))
    around = ("layer_norm turned {} fp32 to bf16", "dropout activated {} gelu bf16", "dropout gated {} bf16 on fp32")
    expected = [
        of_scan + sum(found[row.format(way)] for row in around)
        for of_scan, way in zip(bytes_of_rows(S4, "chunk"), ("forward", "backward"), strict=True)
    ]
    # that norm turns what is scanned, and its gradient back
    expected = [
        moved - found[f"chunk_scan {turn} rows bf16"] for moved, turn in zip(expected, ("to", "from"), strict=True)
    ]
    expected[0] += next(training) - next(training)
    assert moved == pytest.approx(expected, rel=0.01)
    assert moved < [ssm.forward_traffic, ssm.backward_traffic]  # the rest is of operators of PyTorch


def test_the_table_of_a_sublayer_of_the_recipe_is_what_is_counted():
    """That of docs/scaling.md: bytes, the least that can be, launches; the least at 8 windows by hand as well."""
    values = read_train_config(str(REPO / "configs" / "train" / "wikitext103.yaml"), {})
    keys = {"vocab_size": 1000, "adaptive_cutoffs": None, "head_dropout": 0.0, "arch": ["ssm"]}
    config, length = S4Config(**values["model"] | keys), values["sequence_length"]
    page = (REPO / "docs" / "scaling.md").read_text()
    for batch in (1, 8):
        (ssm,) = count_pieces(config, batch, length, autocast=torch.bfloat16, architecture="sm_90").block
        assert (ssm.forward_launches, ssm.backward_launches) == (8, 16)
        assert "takes 8 launches forward and 16 backward" in page
        cells = [
            cell
            for moved, least in ((ssm.forward_traffic, ssm.forward_least), (ssm.backward_traffic, ssm.backward_least))
            for cell in (f"{moved / 1e6:,.0f}", f"{least / 1e6:,.0f}", f"{moved / least:.1f}")
        ]
        assert f"| {batch} | {' | '.join(cells)} |" in page
    elements, H, N = batch * length * config.hidden_size, config.hidden_size, config.state_size
    matrix = 2 * H * H  # of the projection, kept in bfloat16
    parameters = 4 * (matrix + 2 * H + 2 * H + H * N + 2 * H + 3 * N)  # bias; norm; C; D, dt; Lambda, B, P
    kept = (2 + 2 + 2 + 2 + 4) * elements + 2 * matrix  # signal, states, y, what the product takes and gives
    assert ssm.forward_least == pytest.approx(parameters + kept + 8 * elements, rel=1e-4)
    assert ssm.backward_least == pytest.approx(2 * parameters + kept + 12 * elements, rel=1e-4)


@needs_triton
@pytest.mark.parametrize(("layer_class", "mode"), ROWS, ids=lambda x: getattr(x, "__name__", x))
def test_a_kernel_is_launched_as_often_as_is_counted(layer_class, mode, monkeypatch):
    """The launchers run on the CPU, and what they would launch is counted; a batch of 2 and 16 chunks: segments."""
    from triton.runtime.jit import JITFunction

    from ssm_lm.modeling.triton_cauchy import cauchy_products_kernel
    from ssm_lm.modeling.triton_chunk_scan import FUSED
    from ssm_lm.modeling.triton_diagonal_discretization import diagonal_discretization
    from ssm_lm.modeling.triton_diagonal_operators import diagonal_operators
    from ssm_lm.modeling.triton_dplr_discretization import dplr_discretization
    from ssm_lm.modeling.triton_dplr_operators import dplr_operators
    from ssm_lm.modeling.triton_s5_scan import s5_scan
    from ssm_lm.modeling.triton_ssd_scan import ssd_scan
    from ssm_lm.modeling.triton_ssd_system import ssd_vectors
    from ssm_lm.modeling.triton_vandermonde import vandermonde_kernel

    of_gpu = {"chunk_scan": FUSED, "s5_scan": s5_scan, "ssd_scan": ssd_scan, "ssd_system": ssd_vectors}
    of_gpu |= {"dplr_discretization": dplr_discretization, "dplr_operators": dplr_operators}
    of_gpu |= {
        "diagonal_discretization": diagonal_discretization,
        "diagonal_operators": diagonal_operators,
        "cauchy": cauchy_products_kernel,
        "vandermonde": vandermonde_kernel,
    }
    launched, counted = [], []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: launched.append(self.fn.__name__))
    monkeypatch.setattr(kernels, "kernel_launches", lambda count: contextlib.nullcontext(counted.append(count)))
    totals = []
    for which in (of_gpu, STAND_INS):
        with assume("sm_90", which), contextlib.nullcontext() if which is of_gpu else FakeTensorMode():
            layer = layer_class(16, 8)
            u = torch.zeros(2, 512, layer.input_size, requires_grad=True)
            y, _ = layer(u, mode=mode, output_final_state=False)
            totals.append((len(launched), sum(counted)))
            y.sum().backward()
            totals.append((len(launched), sum(counted)))
    (forward, _), (both, _), (_, counted_forward), (_, counted_both) = totals
    assert 0 < forward < both
    assert (counted_forward, counted_both) == (forward, both)


def test_an_rms_norm_is_one_kernel_on_a_gpu_and_two_back():
    """Without ours: it reads its input and writes its output, and keeps a number a row beside them; a CPU takes six
    operators.
    """
    found, size = [], 3 * 50 * 64 * 4
    for architecture in ("sm_90", None):
        with on_gpu(architecture) if architecture else contextlib.nullcontext(), FakeTensorMode():
            x = torch.empty(3, 50, 64, requires_grad=True)
            norm = RMSNorm(64)
            norm.kernels = "torch"
            found.append(trace(norm, [x], None))
    gpu, cpu = found
    assert (gpu.forward_launches, gpu.backward_launches, gpu.forward_in_kernels) == (1, 2, 0)
    assert gpu.forward_traffic == pytest.approx(2 * size, rel=0.02)
    assert gpu.backward_traffic == pytest.approx(5 * size, rel=0.02)  # the gradient and the input are read twice
    assert gpu.kept == size + 3 * 50 * 4
    assert cpu.forward_launches > 4
    assert cpu.kept == 2 * size + 3 * 50 * 4


@needs_triton
def test_a_loss_moves_what_its_report_says():
    """A chunk of logits is read twice and written once, in their dtype; without gradients it is read once."""
    found = []
    for gradient in (True, False):
        with assume("sm_90", STAND_INS), FakeTensorMode(), StorageCounter() as counter:
            z, targets = torch.empty(64, 50257, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int64)
            CROSS_ENTROPY.either(True)(z, targets, None, gradient)
            found.append(counter.in_kernels)
    cases = {case["name"]: case["work"]["bytes"] for case in compile_cases("sm_90")}
    expected = [cases[f"cross_entropy bf16{alone}"] / 65536 * 64 for alone in ("", " loss alone")]
    assert found == pytest.approx(expected, rel=0.01)


def test_dropout_is_one_kernel_on_a_gpu_and_one_back():
    """It keeps a byte an element; on a CPU it is three operators, and keeps their factors. None is none."""
    found, size = [], 3 * 50 * 64 * 4
    for architecture, p in (("sm_90", 0.1), (None, 0.1), ("sm_90", 0.0)):
        with on_gpu(architecture) if architecture else contextlib.nullcontext(), FakeTensorMode():
            x = torch.empty(3, 50, 64, requires_grad=True)
            found.append(trace(torch.nn.Sequential(torch.nn.Dropout(p), torch.nn.Tanh()), [x], None))
    gpu, cpu, none = found
    assert gpu.forward_launches == none.forward_launches + 1
    assert gpu.backward_launches == none.backward_launches + 1
    assert gpu.kept == none.kept + size // 4
    assert [
        g - n for g, n in ((gpu.forward_traffic, none.forward_traffic), (gpu.backward_traffic, none.backward_traffic))
    ] == [2 * size + size // 4] * 2
    assert cpu.forward_launches == none.forward_launches + 3
    assert cpu.kept == none.kept + size


class GatedNorm(torch.nn.Module):
    """As a gated mixer has it: the gate is the end of a wider tensor."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels, eps=1e-5)

    def forward(self, x, wide):
        return self.norm(x, wide[..., -len(self.norm.weight) :])


@needs_triton
def test_a_gated_norm_moves_what_its_report_says_and_holds_what_its_kernel_holds(monkeypatch):
    from ssm_lm.modeling import triton_rms_norm as module

    launched = opened(monkeypatch, module, "norm_rows", "norm_kernel", "norm_backward_kernel")
    with FakeTensorMode():
        inputs = [torch.empty(8, 8192, c, dtype=torch.bfloat16, requires_grad=True) for c in (1536, 3200)]
        rows = [f"rms_norm {way} bf16 to bf16 gated" for way in ("forward", "backward")]
        compare_with_launchers("rms_norm", module.rms_norm, GatedNorm(1536), inputs, rows)
    assert launched == ["norm_kernel", "norm_backward_kernel"]


class Residual(torch.nn.Module):
    """A sublayer that does nothing, around a norm."""

    def __init__(self, norm, **options):
        super().__init__()
        self.norm, self.options = norm, options

    def forward(self, x):
        y, past = self.norm(x, with_input=True, **self.options)
        return past + (gradient_in_rows(y) if self.options.get("turned") else y)


def opened_before_a_sublayer(monkeypatch, module, *kernels: str) -> list[str]:
    """`opened` for a norm that returns its input too: an autograd.Function of the module's calls its launches."""
    launched = opened(monkeypatch, module, "norm_rows", *kernels, parts=("run_forward",) * 3 + ("run_backward",))
    monkeypatch.setattr(module, "norm_rows", module.run_forward)
    monkeypatch.setattr(module, "norm_rows_backward", module.run_backward)
    return launched


@needs_triton
def test_a_norm_before_a_sublayer_moves_what_its_report_says_and_holds_what_its_kernel_holds(monkeypatch):
    from ssm_lm.modeling import triton_rms_norm as module

    names = "norm_kernel", "norm_backward_kernel"
    launched = opened_before_a_sublayer(monkeypatch, module, *names)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        norm = RMSNorm(1536, eps=1e-5)
        norm.before_product = True
        inputs = [torch.empty(8, 8192, 1536, requires_grad=True)]
        rows = ["rms_norm forward fp32 to bf16", "rms_norm backward fp32 to bf16 and past"]
        compare_with_launchers("rms_norm", module.rms_norm, Residual(norm), inputs, rows)
    assert launched == list(names)


@needs_triton
def test_a_layer_norm_moves_what_its_report_says_and_holds_what_its_kernel_holds(monkeypatch):
    from ssm_lm.modeling import triton_layer_norm as module

    names = "layer_norm_kernel", "layer_norm_backward_kernel"
    launched = opened_before_a_sublayer(monkeypatch, module, *names)
    with FakeTensorMode():
        inputs = [torch.empty(8, 8192, 1024, requires_grad=True)]
        for turned in (False, True):
            rows = [f"layer_norm {'turned ' * turned}{way} fp32 to bf16" for way in ("forward", "backward")]
            sublayer = Residual(LayerNorm(1024), turned=turned)
            compare_with_launchers("layer_norm", module.layer_norm, sublayer, inputs, rows)
    assert launched == 2 * list(names)


@needs_triton
def test_dropout_moves_what_its_report_says_and_holds_what_its_kernels_hold(monkeypatch):
    from ssm_lm.modeling import triton_dropout as module
    from ssm_lm.modeling.mixers import GatedProjection

    class Activated(torch.nn.Module):
        def forward(self, x):
            return after_activation(x, x.dtype, GELUActivation(), torch.nn.Dropout(0.25), "auto")(x)

    class Gated(GatedProjection):
        def forward(self, residual, x):
            return at_gated_end(residual, torch.nn.Dropout(0.25), "auto")(x, self.bias)

    class Added(torch.nn.Module):
        def forward(self, residual, x):
            return add_dropped(residual, x, torch.nn.Dropout(0.25), "auto")

    class SwiGLU(torch.nn.Module):
        def forward(self, gate, up):
            return gated_by_silu(gate, up, torch.nn.Dropout(0.25), "auto")

    # a seed without data has no value
    monkeypatch.setattr(module, "scalars", lambda p, seed: (0, 0, 1.0))
    monkeypatch.setattr(module, "draw_seed", lambda: torch.empty(0))
    kernels, size, low = (
        [getattr(module, f"drop_{kind}") for kind in ("activated", "gated", "added", "swiglu")],
        1024,
        {},
    )
    low["dtype"] = torch.bfloat16
    for kind, names, part, of, inputs in (
        ("activated", ["activated_kernel"] * 2, Activated(), "gelu bf16", [(size, low)]),
        ("gated", ["gated_kernel", "gated_backward_kernel"], None, "bf16 on fp32", [(size, {}), (2 * size, low)]),
        ("added", ["activated_kernel"] * 2, Added(), "bf16 on fp32", [(size, {}), (size, low)]),
        ("swiglu", ["swiglu_kernel"] * 2, SwiGLU(), "bf16", [(size, low), (size, low)]),
    ):
        parts = f"run_{kind}", f"save_{kind}", f"backward_of_{kind}", f"run_{kind}_backward"
        launched = opened(monkeypatch, module, kind, *names, parts=parts)
        with FakeTensorMode():
            inputs = [torch.empty(8, 8192, C, requires_grad=True, **dtype) for C, dtype in inputs]
            part = part or Gated(size, 2 * size)
            rows = [f"dropout {kind} {way} {of}" for way in ("forward", "backward")]
            compare_with_launchers("dropout", kernels, part, inputs, rows)
        assert launched == names


def test_what_an_index_names_and_what_is_filled_are_counted_alone():
    with FakeTensorMode():
        table, index = torch.empty(1000, 10), torch.zeros(5, 1, dtype=torch.long)
        for operator, expected in (
            (lambda: table.gather(1, index), 5 * 8 + 2 * 5 * 4),
            (lambda: torch.nn.functional.embedding(index, table), 5 * 8 + 2 * 50 * 4),
            (lambda: table.scatter_add_(1, index, torch.empty(5, 1)), 5 * 8 + 3 * 5 * 4),
            (lambda: torch.zeros_like(table), 40_000),
            (lambda: table.zero_(), 40_000),
            (lambda: table.exp_(), 80_000),
        ):
            with StorageCounter() as counter:
                operator()
            assert (counter.traffic, counter.launches) == (expected, 1)


@needs_triton
@pytest.mark.parametrize("activation", [None, torch.nn.SiLU()], ids=["plain", "silu"])
@pytest.mark.parametrize("layer_class", [S4, S4D, S5, SSD])
@pytest.mark.parametrize("length", [96, 50])
def test_a_stand_in_holds_what_its_kernel_holds(
    layer_class,
    activation,
    length,
    opened_ssd_scan,
    opened_diagonal_discretization,
    opened_diagonal_operators,
    opened_dplr_operators,
    opened_dplr_discretization,
):
    """The kernels' operators say on tensors without data what they would allocate."""
    from ssm_lm.modeling.triton_chunk_scan import FUSED
    from ssm_lm.modeling.triton_s5_scan import s5_scan

    found, of_gpu = [], {"chunk_scan": FUSED, "s5_scan": s5_scan} | opened_ssd_scan
    of_gpu["dplr_operators"], launched = opened_dplr_operators
    of_gpu["dplr_discretization"], of_systems = opened_dplr_discretization
    of_gpu["diagonal_discretization"], of_diagonal_systems = opened_diagonal_discretization
    of_gpu["diagonal_operators"], of_diagonals = opened_diagonal_operators
    for which in (of_gpu, STAND_INS):
        with assume("sm_90", which), FakeTensorMode():
            layer = layer_class(16, 8)
            u = torch.empty(3, length, layer.input_size, requires_grad=True)
            found.append(trace(Output(layer, activation), [u], None))
    ours, theirs = found[1], found[0]
    # forward, again in the backward where operators are made, and back
    expected = {S4: [4, 3, 0, 0], S4D: [0, 0, 3, 3], S5: [0, 0, 0, 2]}.get(layer_class, [0] * 4)
    assert [len(x) for x in (launched, of_systems, of_diagonals, of_diagonal_systems)] == expected
    if layer_class is SSD:  # what PyTorch's operators move beside the kernels
        moved = [each.backward_traffic - each.backward_in_kernels for each in (ours, theirs)]
        assert moved[0] == pytest.approx(moved[1], rel=0.15)
    assert ours.kept == pytest.approx(theirs.kept, rel=0.01)
    assert ours.gradients == theirs.gradients
    assert ours.forward_peak == pytest.approx(theirs.forward_peak, rel=0.1)
    assert ours.backward_peak == pytest.approx(theirs.backward_peak, rel=0.1)


class Convolution(torch.nn.Module):
    """As a gated mixer has it: over the first channels of a wider tensor, with silu."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = ShortConvolution(channels, 4)

    def forward(self, x):
        return self.conv(x[..., : self.conv.channels], output_final_state=False, activation="silu")[0]


@needs_triton
def test_the_short_convolution_moves_what_its_report_says():
    """8 rows of 8,192 tokens, 1,024 channels, in bfloat16; of an element 4 bytes are kept: the input's, and y's."""
    with assume("sm_90", STAND_INS), FakeTensorMode():
        x = torch.empty(8, 8192, 2048, dtype=torch.bfloat16, requires_grad=True)
        found = trace(Convolution(1024), [x], torch.bfloat16)
    cases = {case["name"]: case["work"]["bytes"] for case in compile_cases("sm_90")}
    expected = [cases[f"short_convolution {way} silu bf16"] for way in ("forward", "backward")]
    assert [found.forward_in_kernels, found.backward_in_kernels] == pytest.approx(expected, rel=0.01)
    assert found.forward_launches == 1
    assert found.kept == pytest.approx(8 * 8192 * 1024 * 2, rel=0.01)  # y; its input is part of x


@needs_triton
@pytest.mark.parametrize("length", [96, 2048])
def test_the_stand_in_of_the_short_convolution_holds_what_its_kernel_holds(length, opened_short_convolution):
    kernel, launched = opened_short_convolution
    found = []
    for which in (kernel, STAND_INS["short_convolution"]):
        with assume("sm_90", {"short_convolution": which}), FakeTensorMode():
            x = torch.empty(3, length, 40, requires_grad=True)
            found.append(trace(Convolution(24), [x], None))
    theirs, ours = found
    assert len(launched) == 2
    assert ours.kept == theirs.kept
    assert ours.gradients == theirs.gradients
    assert ours.forward_peak == pytest.approx(theirs.forward_peak, rel=0.1)
    assert ours.backward_peak == pytest.approx(theirs.backward_peak, rel=0.1)
    # what is hidden from the counter are the two launches; the rest, of PyTorch's operators, is the same
    assert ours.forward_launches == theirs.forward_launches + 1
    assert ours.backward_launches == theirs.backward_launches + 1
