"""The scan of S5, interpreted, forward and backward, against the recurrence in float64; a model that trains on it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_close, assert_passes, compare_with_twin, gapped
from torch.library import opcheck

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.modeling import kernel_limits, triton_s5_scan
from ssm_lm.modeling import s5 as s5_module
from ssm_lm.modeling.prefix_scans import complex_scan
from ssm_lm.modeling.ssm import S5
from ssm_lm.modeling.triton_s5_scan import s5_scan, s5_scan_backward, self_check_cases


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    """Of 8 tokens, so that a short sequence has several."""
    monkeypatch.setattr(kernel_limits, "SHORTEST_S5_CHUNK", 8)
    monkeypatch.setattr(triton_s5_scan, "UNROLL", 4)
    monkeypatch.setattr(triton_s5_scan, "CARRY_UNROLL", 2)


def problem(B, L, P, initial=True, resets=True, dtype=torch.float32):
    """u, log_re, log_im, initial_state, begins"""
    log_re, log_im = -(10 ** (-3 * torch.rand(P // 2).double())), 2 * torch.randn(P // 2).double()
    state = torch.randn(B, P).requires_grad_() if initial else None
    begins = torch.rand(B, L) < 0.15 if resets else None
    u = torch.randn(B, L, P).to(dtype)
    return u.requires_grad_(), log_re.requires_grad_(), log_im.requires_grad_(), state, begins


def compare(inputs):
    compare_with_twin(s5_scan, complex_scan, inputs, 1e-5 if inputs[0].dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("L", [1, 8, 19])  # one token, one chunk, three and a part
def test_scan(L, initial, resets):
    compare(problem(2, L, 10, initial, resets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    compare(problem(2, 19, 6, dtype=dtype))


def test_more_states_than_a_block():
    compare(problem(1, 9, 134))


def test_strides():
    u, log_re, log_im, state, begins = problem(2, 11, 6)
    compare((gapped(u), gapped(log_re), gapped(log_im), gapped(state), begins.T.contiguous().T))
    compare((u.expand(2, 11, 6).detach().transpose(0, 1).contiguous().transpose(0, 1), log_re, log_im, None, None))


@pytest.mark.parametrize(("B", "L"), [(0, 3), (2, 0)])
def test_nothing_to_scan(B, L):
    u, log_re, log_im, state, begins = problem(B, L, 6)
    x, final = s5_scan(u, log_re, log_im, state, begins)
    assert x.shape == u.shape
    assert torch.equal(final, state)
    (grad,) = torch.autograd.grad(final, state, torch.ones_like(final))
    assert torch.equal(grad, torch.ones_like(state))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    L=st.integers(1, 20),
    half=st.integers(1, 9),
    initial=st.booleans(),
    resets=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(B, L, half, initial, resets, dtype):
    inputs = problem(B, L, 2 * half, initial, resets, dtype)
    if dtype == torch.bfloat16:  # Lambda's gradient is one sum over rounded states, in which these may cancel
        inputs[1].requires_grad_(False), inputs[2].requires_grad_(False)
    compare(inputs)


def test_a_gradient_of_one_output_alone():
    inputs = problem(1, 12, 4)
    for index in (0, 1):
        compare_with_twin(lambda *x, i=index: s5_scan(*x)[i], lambda *x, i=index: complex_scan(*x)[i], inputs, 1e-5)


def test_long_memory_keeps_its_phase(monkeypatch):
    """A state that hardly decays, over many chunks of the shipped length: powers of a rounded Lambda would turn."""
    monkeypatch.undo()
    u = torch.randn(1, 300, 4)
    log_re, log_im = torch.tensor([-1e-4, -1e-3]).double(), torch.tensor([0.1234567, 2.7654321]).double()
    compare_with_twin(s5_scan, complex_scan, (u, log_re, log_im, None, None), 1e-5)


def test_documents_never_touch():
    """What is not a number in one document is none of the next one's business, forward or backward."""
    u, log_re, log_im, state, _ = problem(1, 20, 4)
    begins = torch.zeros(1, 20, dtype=torch.bool)
    begins[0, [5, 9]] = True
    with torch.no_grad():
        u[0, 6] = torch.nan
    x, final = s5_scan(u, log_re, log_im, state, begins)
    assert x[:, 9:].isfinite().all()
    assert final.isfinite().all()
    assert x[:, :5].isfinite().all()
    grad = torch.zeros_like(x)
    grad[:, 9:] = torch.randn(1, 11, 4)
    grad[:, 5:9] = torch.nan
    grad_u, grad_state = torch.autograd.grad(x, (u, state), grad)
    assert grad_u[:, 9:].isfinite().all()
    assert not grad_u[:, :5].any()
    assert not grad_state.any()


def test_the_same_bits_again():
    inputs = problem(2, 27, 10)
    results = []
    for _ in range(2):
        x, final = s5_scan(*inputs)
        results.append((x, final, *torch.autograd.grad((x, final), inputs[:4], (x.cos().detach(), final.detach()))))
    assert all(map(torch.equal, *results))


def test_custom_operators():
    inputs = problem(1, 9, 4)
    opcheck(s5_scan, inputs)
    x, final = (z.detach() for z in s5_scan(*inputs))
    opcheck(s5_scan_backward, (torch.randn_like(x), final, x, *(z if z is None else z.detach() for z in inputs[1:])))


def test_self_check(monkeypatch):
    monkeypatch.setattr(kernel_limits, "SHORTEST_S5_CHUNK", 64)
    assert_passes(self_check_cases)


def run(layer, setting, inputs, **options):
    """Outputs, and gradients of the input, the initial state and every parameter."""
    layer.kernels = setting
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = layer(inputs[0], mode="chunk", initial_state=inputs[1] if len(inputs) > 1 else None, **options)
    outputs = [x for x in outputs if x is not None]
    weights = [torch.cos(x.detach()) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [*inputs, *layer.parameters()], weights)]


@pytest.mark.parametrize("case", ["plain", "continued documents", "both ways"])
def test_layer(case):
    layer = S5(5, 8, chunk_size=4, bidirectional=case == "both ways")
    inputs, options = [torch.randn(2, 14, 5)], {}
    if case != "plain":
        options["seq_idx"] = torch.tensor([[0] * 6 + [1] * 8, [2, -1, -1] + [4] * 9 + [-1] * 2])
    if case == "continued documents":
        inputs.append(torch.randn(2, 1, 8))
    expected = run(layer, "torch", inputs, **options)
    for ours, theirs in zip(run(layer, "triton", inputs, **options), expected, strict=True):
        assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_autocast(monkeypatch, seed):
    """The scan and the products around it take bfloat16; the final state is float32's. Over several chunks and
    documents, from a state. The gradients of dt and Lambda are sums of numbers that cancel.
    """
    taken = []
    scan = s5_module.s5_scan
    monkeypatch.setattr(s5_module, "s5_scan", lambda u, *rest: (taken.append(u.dtype), scan(u, *rest))[1])
    torch.manual_seed(seed)
    layer, u, weights, state = S5(16, 24), torch.randn(2, 30, 16), torch.randn(2, 30, 16), torch.randn(2, 1, 24)
    documents, found = (torch.arange(30) >= 13).long().expand(2, -1), []
    for setting, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        layer.to(dtype).kernels = setting
        x = u.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            y, final = layer(x, mode="chunk", initial_state=state.to(dtype), seq_idx=documents, output_final_state=True)
        assert final.dtype == dtype
        names, parameters = zip(*layer.named_parameters(), strict=True)
        gradients = torch.autograd.grad(y, [x, *parameters], weights.to(y.dtype))
        found.append(dict(zip(("y", "final", "u", *names), (y, final, *gradients), strict=True)))
    assert taken == [torch.bfloat16]
    assert found[0]["y"].dtype == torch.bfloat16
    errors = {name: ((x - found[1][name]).norm() / found[1][name].norm()).item() for name, x in found[0].items()}
    near = {name: error for name, error in errors.items() if "Lambda" not in name and name != "log_dt"}
    assert max(near.values()) < 1e-2, errors
    assert max(errors.values()) < 4e-2, errors


def test_parts_of_a_subclass():
    """They run on the kernel's path as well, and in float32, as they did before it took bfloat16."""

    class Own(S5):
        def drive(self, x):
            return 2 * super().drive(x)

        def read(self, signal, x, skipped, reverse):
            return 3 * (signal @ self._C_row(reverse))

    layer, results = Own(4, 6, chunk_size=4), []
    for setting in ("torch", "triton"):
        layer.kernels = setting
        with torch.autocast("cpu", torch.bfloat16):
            results.append(layer(torch.ones(1, 9, 4), mode="chunk")[0])
    assert_close(results[1], results[0], 1e-2)


def test_model():
    """Loss and gradients of a packed batch, and the states that a prefill leaves."""
    torch.manual_seed(2)
    model = S4ForCausalLM(
        S4Config(
            vocab_size=31, hidden_size=12, num_hidden_layers=1, state_size=6, ssm="s5", arch="s4-ffn", mode="chunk"
        )
    ).eval()
    ids = torch.randint(1, 31, (2, 21))
    seq_idx = (torch.arange(21) >= 9).long().expand(2, -1)
    results = []
    for setting in ("torch", "triton"):
        for module in model.modules():
            if isinstance(module, S5):
                module.kernels = setting
        loss = model(ids, labels=ids, seq_idx=seq_idx).loss
        with torch.no_grad():
            state = model(ids, use_cache=True).past_key_values.layers[0].states[0].clone()
        results.append((loss, state, *torch.autograd.grad(loss, list(model.parameters()))))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert_close(ours, theirs, 1e-5)
