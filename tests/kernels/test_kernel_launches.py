"""The launchers' own launches, compiled and not run: with the arguments, the options and the specialisation that a GPU
would see (an integer that is 1 becomes a constant, one divisible by 16 a promise).
"""

import importlib
import importlib.util

import pytest
import torch

from ssm_lm.bench import compile
from ssm_lm.modeling.ops import ChunkOperators, chunk_scan

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton.runtime import driver
from triton.runtime.jit import JITFunction

MODULES = [f"triton_{name}" for name in compile.kernel_names()]


class Driver:
    """Enough of a driver to compile for a target: nothing is launched."""

    def __init__(self, target: str):
        self.target = compile.parse_target(target)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)  # Triton keeps what it compiled by device

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@pytest.fixture
def launched(monkeypatch):
    """A function that sets the target and returns the list into which every launch puts its compiled kernel."""

    def start(target: str) -> list:
        kernels, run = [], JITFunction.run

        def compile_only(self, *args, grid, warmup, **options):
            kernels.append(run(self, *args, grid=grid, warmup=True, **options))

        monkeypatch.setattr(JITFunction, "run", compile_only)
        for name in MODULES:  # CPU tensors have no architecture of their own
            module = importlib.import_module(f"ssm_lm.modeling.{name}")
            if hasattr(module, "architecture"):
                monkeypatch.setattr(module, "architecture", lambda device: target)
        driver.set_active(Driver(target))
        return kernels

    yield start
    driver.set_active(None)  # the default one, which is looked for when it is needed


@pytest.fixture
def seen(launched, monkeypatch):
    """The keys under which Triton would keep what launches compile for an H100; they compile nothing."""
    keys = set()
    launched("sm_90")
    monkeypatch.setattr(JITFunction, "_do_compile", lambda self, key, *rest: keys.add((self.fn.__name__, key)))
    monkeypatch.setattr(JITFunction, "device_caches", {}, raising=False)
    return keys


# what the launches of a self-check and of the training shape compiled when sizes were specialised on, and the kernel of
# the taps' gradient, which was PyTorch's then
COMPILED_BEFORE = 12 + 7 + 1


def test_training_and_prompts_compile_what_the_self_check_has_seen(seen):
    """The recipe's scan on an H100, by the keys under which Triton keeps machine code; nothing is compiled here."""
    from ssm_lm.modeling import triton_chunk_scan as scan

    def check(*problem):
        for case in scan.self_check_cases(torch.device("cpu"), torch.bfloat16, 64, True, *problem):
            case.kernel()
        return len(seen)

    def run(B, L, gradient, state=False, rest=False, activation="gelu", H=16, N=64):
        T = L if rest else 64
        u = torch.ones(B, L, H, dtype=torch.bfloat16, requires_grad=gradient)
        operators = ChunkOperators(torch.ones(H, T), torch.ones(H, T, N), torch.ones(H, N, T), torch.ones(H, N, N))
        first = torch.zeros(B, H, N) if state else None
        with torch.set_grad_enabled(gradient):
            y, _ = chunk_scan(u, operators, first, activation=activation, rest=rest, run_kernel=True)
        if gradient:
            y.sum().backward()

    # chunks of 64, gradients, no documents, from zero
    compiled = check(64, True, False, False, "gelu")
    assert compiled <= COMPILED_BEFORE / 2, sorted(name for name, _ in seen)
    for B, L in ((1, 8192), (1, 8191), (2, 1024), (8, 1000), (16, 128), (17, 70)):
        run(B, L, True)
    assert len(seen) == compiled
    # decoding: a prompt, and more of it on what is cached, whole chunks and what is left
    compiled = check(64, False, False, False, "gelu")
    for B, L in ((1, 1), (1, 33), (1, 64), (1, 100), (1, 5000), (3, 77)):
        run(B, L, False)
    assert len(seen) == compiled
    compiled = check(64, False, False, True, "gelu")
    for B, L in ((1, 64), (1, 4096), (2, 192)):
        run(B, L, False, state=True)
    for L in (1, 2, 15, 16, 31, 32, 48, 63):
        run(1, L, False, state=True, rest=True)
    assert len(seen) == compiled


def test_another_length_of_ssd_compiles_nothing_new(seen):
    """What the self-check of a layer has compiled is what training, other lengths and more heads run; nothing is
    compiled here.
    """
    from ssm_lm.modeling import triton_ssd_scan as scan
    from ssm_lm.modeling import triton_ssd_system as system

    cpu = torch.device("cpu")
    cases = scan.self_check_cases(cpu, torch.bfloat16, 64, 64)
    for case in cases + system.self_check_cases(cpu, torch.bfloat16, torch.float32, 64):
        case.kernel()
    compiled = len(seen)
    # constant and selective, packed and not; eight launches of 32 tokens or of 16; b and c, turns, both ways
    assert compiled == 2 * 2 * 8 + 2 + 2

    def run(B, L, E, selective, packed, state):
        x = torch.ones(B, L, 64 * (E + 2), dtype=torch.bfloat16, requires_grad=True)
        v, vectors = x.split([64 * E, 128], -1)
        if selective:  # with a token's raw steps rows lie otherwise apart
            vectors = torch.cat([vectors, v[..., :E]], -1)[..., :128]
        b, c = system.ssd_vectors(vectors, *(torch.ones(64, requires_grad=True) for _ in range(4)))
        dt = torch.ones((B, L, E) if selective else (E,), dtype=torch.float64)
        begins = torch.zeros(B, L, dtype=torch.bool) if packed else None
        state = torch.zeros(B, E * 64, 64) if state else None
        rates = (
            torch.ones(E, dtype=torch.float64),
            torch.ones(32, dtype=torch.float64).expand(E, -1),
            torch.ones(64 * E),
        )
        scan.ssd_scan(v, b, c, dt, *rates, state, begins, 16 if selective else 32)[0].sum().backward()

    for B, L, E in ((8, 1024, 2), (1, 17, 1), (3, 1001, 3)):
        run(B, L, E, False, False, False)
        run(B, L, E, True, True, True)
    assert len(seen) == compiled


def test_another_batch_of_the_rms_norm_compiles_nothing_new(seen):
    """What the self-check of a norm has compiled, a kernel each way, is what other batches and lengths run."""
    from ssm_lm.modeling.triton_rms_norm import rms_norm, self_check_cases

    problem = torch.bfloat16, torch.float32, torch.bfloat16, 1536, True, False
    for case in self_check_cases(torch.device("cpu"), *problem):
        case.kernel()
    compiled = len(seen)
    assert compiled == 2
    for B, L in ((8, 1024), (1, 1), (1, 17), (3, 333)):
        x, wide = (torch.empty(B, L, size, dtype=torch.bfloat16, requires_grad=True) for size in (1536, 3200))
        rms_norm(x, torch.ones(1536, requires_grad=True), 1e-5, wide[..., 1664:]).sum().backward()
    assert len(seen) == compiled


def test_another_batch_of_the_ssd_step_compiles_nothing_new(seen):
    """A kernel for constant steps and one for tokens' own; nothing is compiled here."""
    from ssm_lm.modeling.triton_ssd_step import example, ssd_step_

    for B in (1, 2, 16, 33):
        for selective in (False, True):
            state, system, shape = example(B, 24, 64, 64, selective)
            x, skip = torch.ones(shape, dtype=torch.bfloat16), torch.ones(24 * 64)
            ssd_step_(x, state, *system.coefficients(), skip, "identity")
    assert len(seen) == 2


def test_another_batch_of_a_layer_norm_and_of_dropout_compiles_nothing_new(seen):
    """Nor another seed, probability or, of what is no multiple of 16, length; the problems are the recipe's."""
    from ssm_lm.modeling import triton_dropout, triton_layer_norm

    low = torch.bfloat16
    for module, problem, count in (
        (triton_layer_norm, (torch.float32, torch.float32, low, 1024), 2),
        (triton_layer_norm, (torch.float32, torch.float32, low, 1024, True), 2),
        (triton_dropout, ("activated", low, "gelu"), 4),  # of a multiple of 16, and of any number
        (triton_dropout, ("gated", torch.float32, low, 1024, True), 2),
        (triton_dropout, ("added", torch.float32, low), 4),
        (triton_dropout, ("swiglu", low, True), 4),
    ):
        before = len(seen)
        for case in module.self_check_cases(torch.device("cpu"), *problem):
            case.kernel()
        seen_before = set(seen)
        assert len(seen) - before == count
        for B, L, p in ((8, 1024, 0.25), (1, 1, 0.5), (1, 17, 0.1), (3, 333, 0.9)):
            x = torch.empty(B, L, 1024, requires_grad=True)
            wide = torch.empty(B, L, 2048, dtype=low, requires_grad=True)
            if module is triton_layer_norm:
                turned = len(problem) == 5  # of rows 16 at a time
                x = torch.empty(B, 16 * L, 1024, requires_grad=True) if turned else x
                y, past = module.layer_norm(x, *torch.ones(2, 1024, requires_grad=True), 1e-5, low, turned)
                (y.sum() + past.sum()).backward()
            elif problem[0] == "activated":
                for signal in (wide, torch.empty(B, L, 3, dtype=low, requires_grad=True)):
                    module.drop_activated(signal, "gelu", p).sum().backward()
            elif problem[0] == "added":
                for signal in (x, torch.empty(B, L, 3, requires_grad=True)):
                    added = signal.detach().to(low).requires_grad_()
                    module.drop_added(signal, added, p).sum().backward()
            elif problem[0] == "swiglu":
                for signal in (wide, torch.empty(B, L, 3, dtype=low, requires_grad=True)):
                    module.drop_swiglu(signal, signal.detach().requires_grad_(), p).sum().backward()
            else:
                module.drop_gated(x, wide, torch.ones(2048, requires_grad=True), p).sum().backward()
        assert set(seen) == seen_before


def test_another_chunk_of_the_loss_compiles_nothing_new(seen):
    """What the self-check of a head has compiled is what chunks of other sizes run, with gradients."""
    from ssm_lm.modeling.triton_cross_entropy import logits_to_loss, self_check_cases

    for V in (50257, 32768):
        for case in self_check_cases(torch.device("cpu"), torch.bfloat16, None, V):
            case.kernel()
        compiled = len(seen)
        for n in (1, 16, 37):
            logits_to_loss(torch.empty(n, V, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.int64))
        assert len(seen) == compiled
    assert compiled == 2


def test_another_length_of_the_short_convolution_compiles_nothing_new(seen):
    """What the self-check of a layer has compiled, two kernels in training and one else, is what batches, prompts and
    tokens of decoding run, whole or part of a wider tensor; nothing is compiled here.
    """
    from ssm_lm.modeling.triton_short_convolution import self_check_cases, short_convolution

    def run(B, L, trains, packed, tail):
        u = torch.empty(B, L, 2176, dtype=torch.bfloat16)[..., :1152].requires_grad_(trains)
        weight, bias = torch.ones(1152, 4, requires_grad=trains), torch.ones(1152, requires_grad=trains)
        documents = (
            (torch.zeros(B, L, dtype=torch.bool), torch.zeros(B, L, dtype=torch.long)) if packed else (None, None)
        )
        tail = torch.zeros(B, 3, 1152) if tail else None
        y, new_tail = short_convolution(u, weight, bias, tail, *documents, "silu", has_tail=tail is not None)
        if trains:
            (y.sum() + (0 if tail is None else new_tail.sum())).backward()

    for packed, trains in ((False, True), (True, True), (False, False)):
        before = len(seen)
        for case in self_check_cases(torch.device("cpu"), torch.bfloat16, torch.float32, 4, "silu", packed, trains):
            case.kernel()
        compiled = len(seen)
        assert compiled - before == (2 if trains else 0)  # inference's is among those of training
        for B, L in ((2, 512), (1, 1), (3, 17), (2, 2), (1, 1001), (16, 1)):
            for tail in (False, True):
                run(B, L, trains, packed, tail)
        assert len(seen) == compiled


def test_another_length_of_the_operators_compiles_nothing_new(seen):
    """Nor do more channels, or what is left of a sequence; nothing is compiled here."""
    from ssm_lm.modeling.triton_dplr_operators import dplr_operators, example, self_check_cases

    for rank in (1, 2):
        for case in self_check_cases(torch.device("cpu"), 64, rank):
            case.kernel()
        assert len(seen) == 3 * rank
        for H, T in ((1024, 64), (1, 1), (16, 16), (5, 33)):
            inputs = [x.requires_grad_() for x in example(H, 64, rank)]
            skip = torch.ones(H, requires_grad=True) if T > 1 else None
            taps, emit, inject, carry = dplr_operators(*inputs, T, skip)
            gram = torch.ones(H, T + 64, T + 64)
            weights = torch.ones(H, T), gram[:, :T, T:], gram[:, T:, :T], gram[:, T:, T:]
            torch.autograd.grad((taps, emit, inject, carry), inputs, weights)
        assert len(seen) == 3 * rank


def test_another_length_of_the_operators_of_a_diagonal_compiles_nothing_new(seen):
    """Nor do more channels; nothing is compiled here."""
    from ssm_lm.modeling.triton_diagonal_operators import diagonal_operators, example, self_check_cases

    for case in self_check_cases(torch.device("cpu"), 64):
        case.kernel()
    for H, T in ((1024, 64), (1, 1), (16, 16), (5, 33)):
        inputs = [x.requires_grad_() for x in example(H, 64)]
        skip = torch.ones(H, requires_grad=True) if T > 1 else None
        taps, emit, inject, carry = diagonal_operators(*inputs, T, skip)
        gram = torch.ones(H, T + 64, T + 64)
        weights = torch.ones(H, T), gram[:, :T, T:], gram[:, T:, :T], torch.ones(H, 64)
        torch.autograd.grad((taps, emit, inject, carry), inputs, weights)
    assert len(seen) == 2


@pytest.mark.parametrize(("name", "problem"), [("dplr_discretization", (64, 1)), ("diagonal_discretization", (64,))])
def test_another_width_of_a_discretisation_compiles_nothing_new(seen, name, problem):
    """Nor do systems that channels share; nothing is compiled here."""
    module = importlib.import_module(f"ssm_lm.modeling.triton_{name}")
    for case in module.self_check_cases(torch.device("cpu"), *problem):
        case.kernel()
    for H, S in ((1024, 1024), (1024, 1), (16, 4), (1, 1)):
        inputs = [x.requires_grad_() for x in module.example(H, S, *problem)]
        sum(x.sum() for x in getattr(module, name)(*inputs)).backward()
    assert len(seen) == 2


def check(kernels: list, at_least: int) -> None:
    assert len(kernels) >= at_least
    for kernel in {kernel.hash: kernel for kernel in kernels}.values():
        found = compile.resources(kernel, disassembled=False)
        assert found.spills == 0, kernel.metadata.name
        assert found.stack == 0, kernel.metadata.name
        assert found.shared <= found.shared_limit
        assert not found.tcgen05


@pytest.mark.parametrize("n_ssm", [1, 2])
def test_cauchy(launched, n_ssm):
    """Shared by all channels as in the WikiText-103 model, where n_ssm and the number of splits are constants."""
    from ssm_lm.modeling.triton_cauchy import cauchy_products_kernel, example

    kernels = launched("sm_90")
    inputs = [x.requires_grad_() for x in example(1024, n_ssm, 64, 1, 4)[:-1]] + example(1024, n_ssm, 64, 1, 4)[-1:]
    torch.view_as_real(cauchy_products_kernel(*inputs)).sum().backward()
    check(kernels, 2)


@pytest.mark.long
@pytest.mark.proof
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", MODULES)
def test_self_checks(launched, name, target):
    """All that the first use on a GPU launches."""
    if (name, target) == ("triton_ssd_scan", "gfx942"):
        pytest.skip("its rule refuses AMD's cards: kernel_limits.py")
    cases = importlib.import_module(f"ssm_lm.modeling.{name}").self_check_cases
    kernels = launched(target)
    # of ssd's scan, those of training under autocast; float32's are rows of the report
    for case in cases(torch.device("cpu"), *([torch.bfloat16] if name == "triton_ssd_scan" else [])):
        case.kernel()
    check(kernels, 1)


SMALLEST = [
    *((name, target) for target in ("sm_90", "gfx942") for name in ("cauchy", "vandermonde", "s5_scan", "step")),
    *(("ssd_step", target) for target in ("sm_90", "gfx942")),
    *((f"diagonal_{name}", target) for target in ("sm_90", "gfx942") for name in ("operators", "discretization")),
    *((f"dplr_{name}", target) for target in ("sm_90", "gfx942") for name in ("operators", "discretization")),
    *(("chunk_scan", target) for target in ("sm_90", "sm_100", "gfx942")),  # Blackwell has other matrix instructions
]


@pytest.mark.long
@pytest.mark.proof
@pytest.mark.parametrize(("name", "target"), SMALLEST)
def test_smallest_sizes(launched, name, target):
    """Every size that can be 1 is, and so a constant: B, H, L, N/2, n_ssm, chunks, the padding."""
    module = importlib.import_module(f"ssm_lm.modeling.triton_{name}")
    kernels = launched(target)
    if name == "cauchy":
        for rank in (1, 2):
            inputs = [x.requires_grad_() for x in module.example(1, 1, 2, rank, 1)[:-1]]
            torch.view_as_real(module.cauchy_products_kernel(*inputs, torch.ones(1))).sum().backward()
    elif name == "chunk_scan":
        for dtype in (torch.float32, torch.bfloat16):
            for H, T, N in ((1, 2, 2), (16, 16, 64)):
                for carry in (torch.ones(H, N), torch.ones(H, N, N)):
                    operators = ChunkOperators(torch.ones(H, T), torch.ones(H, T, N), torch.ones(H, N, T), carry)
                    for L in (T - 1, 8 * T):  # the latter in two segments
                        u = torch.ones(1, L, H, dtype=dtype, requires_grad=True)
                        chunk_scan(u, operators, run_kernel=True)[0].sum().backward()
    elif name == "s5_scan":
        for half in (1, 32):
            u = torch.ones(1, 1, 2 * half, requires_grad=True)
            log = -torch.ones(half, dtype=torch.float64)
            module.s5_scan(u, log, log, None, None)[0].sum().backward()
    elif name == "dplr_operators":
        for rank in (1, 2):
            inputs = [x.requires_grad_() for x in module.example(1, 2, rank)]
            sum(x.sum() for x in module.dplr_operators(*inputs, 1)).backward()
    elif name == "diagonal_operators":
        inputs = [x.requires_grad_() for x in module.example(1, 2)]
        sum(x.sum() for x in module.diagonal_operators(*inputs, 1)).backward()
    elif name == "diagonal_discretization":
        inputs = [x.requires_grad_() for x in module.example(1, 1, 2)]
        sum(x.sum() for x in module.diagonal_discretization(*inputs)).backward()
    elif name == "dplr_discretization":
        for rank in (1, 2):
            inputs = [x.requires_grad_() for x in module.example(1, 1, 2, rank)]
            sum(x.sum() for x in module.dplr_discretization(*inputs)).backward()
    elif name == "ssd_step":
        for sizes in ((1, 1, 1, 2), (1, 16, 16, 64)):
            for selective in (False, True):
                state, system, shape = module.example(*sizes, selective)
                skip = torch.ones(state.shape[1])
                module.ssd_step_(torch.ones(shape, dtype=torch.float16), state, *system.coefficients(), skip, "silu")
    elif name == "step":
        for H, N in ((1, 2), (1024, 64)):
            u, skip = torch.ones(1, H, dtype=torch.bfloat16), torch.ones(H)
            for K in (2, 5, 7):
                module.siso_step_(u, torch.ones(1, H, N), torch.ones(K, H, N), skip, "gelu")
            weights = torch.ones(N, H), torch.ones(H, N)
            module.mimo_step_(u, torch.ones(1, 1, N), torch.ones(N), *weights, skip, "gelu")
    else:
        inputs = [x.requires_grad_() for x in module.example(1, 2)]
        module.vandermonde_kernel(*inputs, 1).sum().backward()
    check(kernels, 2)
