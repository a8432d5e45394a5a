"""The registry: what runs where, what is said about it, and the tuned choices that several processes share."""

import json
import sys
import threading
import warnings

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from ssm_lm import S4Config
from ssm_lm.modeling import kernel_launch, kernels_s4
from ssm_lm.modeling.kernel_launch import family, tuned
from ssm_lm.modeling.kernels_s4 import Case, self_check
from ssm_lm.modeling.ops import kernel_status, use_kernel

CPU = torch.zeros(2)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A registry that has seen nothing."""
    for module, name in ((kernels_s4, "_causes"), (kernels_s4, "_errors"), (kernel_launch, "_tuned")):
        monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(kernels_s4, "_warned", set())
    monkeypatch.delenv("SSM_LM_KERNELS", raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose kernels are fine, unless a cause is put in: {operation: cause}. Counts how often it was asked."""
    causes, asked = {}, []

    def find_cause(op, device, problem):
        asked.append((op, device, *problem))
        return causes.get(op)

    monkeypatch.setattr(kernels_s4, "_find_cause", find_cause)
    return causes, asked


def decide(op="chunk_scan", device="cuda:0", unsupported=None, setting="auto", problem=()):
    return kernels_s4._decide(op, device, unsupported, setting, problem)


def test_cpu_tensors_take_the_twin_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not use_kernel("chunk_scan", CPU)
        assert not use_kernel("chunk_scan", CPU, unsupported="anything")


def test_a_gpu_takes_the_kernel_and_is_checked_once(gpu):
    _, asked = gpu
    assert decide()
    assert decide()
    assert decide(device="cuda:1")
    assert asked == [("chunk_scan", "cuda:0"), ("chunk_scan", "cuda:1")]


def test_every_problem_is_checked_once(gpu):
    _, asked = gpu
    for _ in range(2):
        assert decide(problem=(torch.bfloat16, 64, True))
        assert decide(problem=(torch.bfloat16, 128, True))
    assert asked == [("chunk_scan", "cuda:0", torch.bfloat16, N, True) for N in (64, 128)]


@pytest.mark.parametrize(("ssm", "dense"), [("s4", True), ("s4d", False)])
def test_a_layer_names_its_problem(gpu, monkeypatch, ssm, dense):
    """What its machine code depends on, so that just that is checked."""
    from ssm_lm.modeling import ssm as layers

    _, asked = gpu
    monkeypatch.setattr(kernels_s4, "_name", lambda device: "cuda:0")
    layer = getattr(layers, ssm.upper())(hidden_size=2, state_size=6)
    execution = layer.decide(torch.zeros(1, 8, 2))
    assert execution.kernel
    assert execution.mode == "chunk"
    # in chunks of 32; for training, without documents, from zero, without an activation
    assert asked == [("chunk_scan", "cuda:0", torch.float32, 6, dense, 32, True, False, False, "identity")]
    with torch.no_grad():
        layer.decide(torch.zeros(1, 8, 2), initial_state=torch.zeros(1, 2, 6), activation=torch.nn.SiLU())
        assert asked[1][6:] == (True, False, True, "silu")  # a module that trains asks for gradients at once
        layer.eval().decide(torch.zeros(1, 8, 2), documents=True, activation=torch.nn.SiLU())
        assert asked[2][6:] == (False, True, False, "identity")  # applied to the output, once it is put together


def test_one_warning_names_operation_and_cause(gpu):
    gpu[0]["chunk_scan"] = "its self-check failed: dense bfloat16 differs by 0.5, more than 0.02"
    with pytest.warns(UserWarning, match=r"chunk_scan .* cuda:0.*differs by 0.5"):
        assert not decide()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not decide()
    with pytest.warns(UserWarning, match="its numbers are float64"):
        assert not decide(op="cauchy", unsupported="its numbers are float64")


def test_settings(gpu, monkeypatch):
    assert not decide(setting="torch")
    monkeypatch.setenv("SSM_LM_KERNELS", "triton")  # goes before the config
    assert decide(setting="torch")
    with pytest.raises(RuntimeError, match=r"forced.*chunk_scan.*float64"):
        decide(unsupported="its numbers are float64")
    monkeypatch.setenv("SSM_LM_KERNELS", "cuda")
    with pytest.raises(ValueError, match="auto, triton, torch"):
        decide()
    with pytest.raises(StrictDataclassClassValidationError, match="kernels"):
        S4Config(kernels="cuda")


def test_forced_without_a_gpu_or_an_interpreter():
    with pytest.raises(
        RuntimeError, match=r"chunk_scan cannot run on cpu: (there is no GPU|Triton cannot be imported)"
    ):
        use_kernel("chunk_scan", CPU, setting="triton")


def test_tensors_on_several_devices():
    with pytest.raises(RuntimeError, match=r"several devices \(cpu, meta\)"):
        use_kernel("chunk_scan", CPU, CPU.to("meta"), setting="triton")


def test_status(monkeypatch):
    lines = kernel_status()
    assert set(lines) == set(kernels_s4.OPERATIONS)
    assert all(line.startswith("PyTorch: ") and "\n" not in line for line in lines.values())
    monkeypatch.setenv("SSM_LM_KERNELS", "torch")
    assert set(kernel_status().values()) == {"PyTorch: SSM_LM_KERNELS=torch"}


def test_triton_that_cannot_be_imported_is_a_cause(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert kernels_s4._find_cause("chunk_scan", "cuda:0").startswith("Triton cannot be imported (ModuleNotFoundError")


@pytest.mark.parametrize(
    ("kernel", "cause"),
    [
        (lambda: [torch.ones(3)], None),
        (lambda: [torch.ones(3) * 1.1], "half differs by 0.1, more than 0.01"),
        (lambda: [torch.full((3,), float("nan"))], "not the same"),
        (lambda: [torch.rand(3)], "not the same"),
        (lambda: [torch.ones(4)], "failed (RuntimeError"),
        (lambda: 1 / 0, "failed (ZeroDivisionError: division by zero)"),
    ],
)
def test_self_check_of(kernel, cause):
    found, _ = self_check(lambda device: [Case("half", kernel, lambda: [torch.ones(3)], 0.01)], torch.device("cpu"))
    assert found is None if cause is None else cause in found


def test_no_memory_is_no_verdict(monkeypatch):
    """Another rank, or the next forward, may have it."""
    full = [True]

    def find_cause(op, device, problem):
        def kernel():
            if full:
                raise torch.OutOfMemoryError("tried to allocate")
            return [torch.ones(3)]

        return self_check(lambda device: [Case("x", kernel, lambda: [torch.ones(3)], 0.01)], torch.device("cpu"))[0]

    monkeypatch.setattr(kernels_s4, "_find_cause", find_cause)
    with pytest.warns(UserWarning, match="no memory left"):
        assert not decide()
    full.clear()
    assert decide()


def test_a_lost_device_ends_the_process(monkeypatch):
    """After an illegal address every call fails, the twin's too: no verdict, but an end with the way out."""

    def kernel():
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    cause, _ = self_check(lambda device: [Case("x", kernel, kernel, 0.01)], torch.device("cpu"))
    assert "SSM_LM_KERNELS=torch" in cause
    assert "illegal memory access" in cause
    monkeypatch.setattr(kernels_s4, "self_check", lambda cases, device: (cause, 0.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(kernels_s4, "architecture", lambda device: "sm_90")
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match="the kernel chunk_scan: its self-check took down the device"):
        decide()


def test_self_check_sees_nothing_of_the_callers_modes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def kernel():
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert not decide(setting="triton")  # a part of a twin is a twin
        return [torch.ones(2)]

    case = Case("x", kernel, lambda: [torch.ones(2)], 0.1)
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cause, _ = self_check(lambda device: [case], torch.device("cpu"))
    assert cause is None


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("sm_80", "cuda"),
        ("sm_90", "cuda"),
        ("sm_100", "blackwell"),
        ("sm_120", "blackwell"),
        ("gfx942", "hip"),
        ("interpreter", "interpreter"),
    ],
)
def test_families(architecture, expected):
    assert family(architecture) == expected


# ---- tuning


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """tune(times) -> the choice, on a GPU on which configuration i takes times[i]; tune.launches counts."""
    file = tmp_path / "kernels" / "card.json"
    monkeypatch.setattr(kernel_launch, "_tuning_file", lambda device: file)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("LOCAL_RANK", "SSM_LM_KERNEL_TUNING"):
        monkeypatch.delenv(name, raising=False)

    def tune(times, problem="N64", op="chunk_scan"):
        def seconds(run, configuration):
            tune.launches += 1
            return times[configuration]

        monkeypatch.setattr(kernel_launch, "_seconds", seconds)
        return tuned(op, problem, list(times), lambda configuration: None, torch.device("cuda"))

    tune.launches, tune.file = 0, file
    return tune


def test_the_fastest_is_measured_once_and_kept(tuner, monkeypatch):
    assert tuner({"a": 2, "b": 1}) == "b"
    assert tuner({"a": 1, "b": 2}) == "b"  # of the process
    monkeypatch.setattr(kernel_launch, "_tuned", {})
    assert tuner({"a": 1, "b": 2}) == "b"  # of the file
    assert tuner.launches == 2
    assert json.loads(tuner.file.read_text()) == {"chunk_scan N64": "'b'"}
    assert tuner({"a": 1, "c": 2}) == "a"  # b is shipped no more


def test_default_without_tuning(tuner, monkeypatch):
    assert tuner({"a": 1}) == "a"
    monkeypatch.setenv("SSM_LM_KERNEL_TUNING", "0")
    assert tuner({"a": 2, "b": 1}) == "a"
    monkeypatch.delenv("SSM_LM_KERNEL_TUNING")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert tuner({"a": 2, "b": 1}) == "a"
    assert tuner.launches == 0
    tuner.file.parent.mkdir()
    tuner.file.write_text(json.dumps({"chunk_scan N64": "'b'"}))
    monkeypatch.setattr(kernel_launch, "_tuned", {})
    assert tuner({"a": 2, "b": 1}) == "b"  # what another process has written


@pytest.mark.parametrize("content", ["", "[1]", '{"chunk_scan N64": 3}', "\x00"])
def test_a_broken_file_is_replaced(tuner, content):
    tuner.file.parent.mkdir()
    tuner.file.write_text(content)
    assert tuner({"a": 2, "b": 1}) == "b"
    assert json.loads(tuner.file.read_text())["chunk_scan N64"] == "'b'"


def test_a_cache_that_cannot_be_written(tuner):
    tuner.file.parent.write_text("a file where the folder should be")
    for _ in range(3):  # what was measured stays known in the process
        assert tuner({"a": 2, "b": 1}) == "b"
        assert tuner({"a": 1, "b": 2}, problem="N32") == "a"
    assert tuner.launches == 4


def test_writers_at_the_same_time(tmp_path):
    """Every reader sees a whole file, and nothing is left over."""
    file, stop, seen = tmp_path / "card.json", threading.Event(), []

    def read():
        while not stop.is_set():
            if file.exists():
                seen.append(len(json.loads(file.read_text())))

    reader = threading.Thread(target=read)
    reader.start()
    entries = {f"op {i}": "x" * 50 for i in range(500)}
    writers = [
        threading.Thread(target=lambda: [kernel_launch._write(file, entries) for _ in range(20)]) for _ in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert set(seen) == {500}
    assert list(tmp_path.iterdir()) == [file]
