"""The promise of the package: chunk == fft == recurrent == an independent dense reference."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_lm.modeling.ssm import S4, S4D, S5

LAYERS = {
    "s4": lambda **kw: S4(4, 16, **kw),
    "s4-shared": lambda **kw: S4(4, 16, n_ssm=1, **kw),
    "s4-legt": lambda **kw: S4(4, 16, init="legt", **kw),
    "s4-fourier": lambda **kw: S4(4, 16, init="fourier", n_ssm=2, **kw),
    "s4d-legs": lambda **kw: S4D(4, 16, init="legs", **kw),
    "s4d-lin": lambda **kw: S4D(4, 16, init="lin", **kw),
    "s4d-inv": lambda **kw: S4D(4, 16, init="inv", **kw),
    "s4d-quad": lambda **kw: S4D(4, 16, init="quad", **kw),
    "s4d-real": lambda **kw: S4D(4, 16, init="real", **kw),
    "s4d-bilinear": lambda **kw: S4D(4, 16, discretization="bilinear", n_ssm=2, **kw),
    "s5": lambda **kw: S5(4, 16, blocks=2, **kw),
    "s5-bilinear": lambda **kw: S5(4, 16, discretization="bilinear", **kw),
}
MODES = ("chunk", "fft", "recurrent")


KERNEL_LAYERS = [name for name in LAYERS if not name.startswith("s5")]


def make(name, seed=0, **kw):
    torch.manual_seed(seed)
    return LAYERS[name](**kw).double()


def modes_of(layer):
    return (*MODES, "associative") if layer.name == "s5" else MODES


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# the three layers at every kind of length: one token, less than a chunk of 64, one chunk, a ragged one, many; their
# variants have other operators and take the same paths
THREE = ("s4", "s4d-legs", "s5")
LENGTHS = [(name, length) for name in LAYERS for length in ((1, 7, 64, 100, 1000) if name in THREE else (1, 100))]


@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-a-state"])
@pytest.mark.parametrize(("name", "length"), LENGTHS)
def test_every_mode_equals_the_dense_reference(name, length, initial):
    layer = make(name)
    u = torch.randn(2, length, 4, dtype=torch.float64)
    state = torch.randn(2, *layer.state_shape, dtype=torch.float64) if initial else None
    expected, states = reference.run(layer, u, reference.complex_state(layer, state) if initial else None)
    with torch.no_grad():
        for mode in modes_of(layer):
            y, final = layer(u, mode=mode, initial_state=state)
            assert relative_error(y, expected) < 1e-9, mode
            assert relative_error(reference.complex_state(layer, final), states[:, -1]) < 1e-9, mode


@pytest.mark.parametrize(
    ("length", "chunk_size", "every"), [(1, 8, 1), (35, 8, 1), (1000, 64, 7)], ids=["one-token", "short", "long"]
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["s4", "s4-legt", "s4d-legs", "s5"])
def test_split_at_every_point(name, mode, length, chunk_size, every):
    """Two halves with the state handed over equal the whole, wherever the cut is: every seventh of a thousand cuts has
    been at every place of a chunk of 64.
    """
    if length == 1000 and mode != "chunk":
        every = 97  # the other modes know no chunks, and are slow
    layer = make(name, chunk_size=chunk_size)
    u = torch.randn(2, length, 4, dtype=torch.float64)
    start = torch.randn(2, *layer.state_shape, dtype=torch.float64)
    with torch.no_grad():
        whole, final = layer(u, mode=mode, initial_state=start)
        for cut in range(0, length + 1, every):
            first, state = layer(u[:, :cut], mode=mode, initial_state=start)
            second, last = layer(u[:, cut:], mode=mode, initial_state=state)
            assert relative_error(torch.cat([first, second], 1), whole) < 1e-9, cut
            assert relative_error(last, final) < 1e-9, cut


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 150), chunk_size=st.integers(1, 70), half=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_chunk_size_any_order(length, chunk_size, half, seed):
    torch.manual_seed(seed)
    layers = [cls(2, 2 * half, chunk_size=chunk_size).double() for cls in (S4, S4D, S5)]
    layers.append(S4(2, 2 * half, init="legt", chunk_size=chunk_size).double())
    for layer in layers:
        u = torch.randn(1, length, 2, dtype=torch.float64)
        state = torch.randn(1, *layer.state_shape, dtype=torch.float64)
        with torch.no_grad():
            outputs = [layer(u, mode=mode, initial_state=state) for mode in MODES]
        for y, final in outputs[1:]:
            assert relative_error(y, outputs[0][0]) < 1e-9
            assert relative_error(final, outputs[0][1]) < 1e-9


@pytest.mark.parametrize("cls", [S4, S4D, S5])
def test_float32_at_length_8192(cls):
    """Each mode in float32 against the recurrence in float64, channel by channel."""
    torch.manual_seed(0)
    single = cls(16, 64)
    double = cls(16, 64).double()
    double.load_state_dict(single.state_dict())
    u = torch.randn(1, 8192, 16)
    with torch.no_grad():
        expected, expected_state = double(u.double(), mode="recurrent")
        for mode in MODES:
            y, state = single(u, mode=mode)
            assert y.dtype == state.dtype == torch.float32
            error = (y - expected).abs().amax((0, 1)) / expected.abs().amax((0, 1))
            assert error.max() < 1e-4, mode
            assert relative_error(state, expected_state) < 1e-4, mode
        if cls is S5:
            return
        kernel, expected_kernel = single.kernel(8192), double.kernel(8192)
        assert relative_error(kernel, expected_kernel) < 5e-6


@pytest.mark.parametrize("name", KERNEL_LAYERS)
def test_kernel_is_the_impulse_response(name):
    layer = make(name)
    for length in (1, 2, 33, 64):
        impulse = torch.zeros(1, length, 4, dtype=torch.float64)
        impulse[:, 0] = 1
        expected, _ = reference.run(layer, impulse)
        expected[:, 0] -= layer.D
        with torch.no_grad():
            assert relative_error(layer.kernel(length), expected[0].T) < 1e-9


@pytest.mark.parametrize("name", ["s4", "s4-legt", "s4d-legs", "s5"])
def test_step_is_the_recurrence(name):
    layer = make(name)
    u = torch.randn(2, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        expected, final = layer(u, mode="chunk")
        state = layer.zero_state(2)
        for t in range(5):
            y, state = layer.step(u[:, t], state)
            assert relative_error(y, expected[:, t]) < 1e-9
    assert relative_error(state, final) < 1e-9


SMALL = {
    "s4": lambda: S4(2, 4, chunk_size=3),
    "s4-legt": lambda: S4(2, 4, init="legt", n_ssm=1, chunk_size=3),
    "s4d-legs": lambda: S4D(2, 4, chunk_size=3),
    "s4d-bilinear": lambda: S4D(2, 4, discretization="bilinear", chunk_size=3),
    "s5": lambda: S5(2, 4, chunk_size=3),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_everything(name, mode):
    """Input, initial state and every parameter, through output and final state, across a ragged chunk."""
    torch.manual_seed(0)
    layer = SMALL[name]().double()
    names = [n for n, _ in layer.named_parameters()]

    def run(u, state, *parameters):
        kwargs = {"mode": mode, "initial_state": state}
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (u,), kwargs)

    u = torch.randn(2, 8, 2, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, *layer.state_shape, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    # the fast mode compares random projections of the Jacobians
    assert torch.autograd.gradcheck(run, (u, state, *parameters), fast_mode=mode == "fft")


ALL_INITS = [(S4, "legs"), (S4, "legt"), (S4, "fourier"), *((S4D, i) for i in ("legs", "lin", "inv", "quad", "real"))]
ALL_INITS.append((S5, "legs"))


@pytest.mark.parametrize(("cls", "init"), ALL_INITS)
def test_stable_at_both_ends_of_dt(cls, init):
    """No value that is not a number, and a bounded impulse response, for any step and any length parity."""
    for dt in (1e-6, 1e-3, 1e-1, 10.0):
        layer = cls(3, 64, init=init, dt_min=dt, dt_max=dt)
        for length in (1, 2, 127, 128):
            u = torch.ones(1, length, 3, requires_grad=True)
            for mode in MODES:
                y, state = layer(u, mode=mode)
                (y.sum() + state.sum()).backward()
                assert torch.isfinite(y).all()
                assert torch.isfinite(u.grad).all()
                assert all(torch.isfinite(p.grad).all() for p in layer.parameters()), (dt, length, mode)


@pytest.mark.parametrize(("cls", "init"), ALL_INITS)
def test_stable_after_random_optimiser_steps(cls, init):
    torch.manual_seed(0)
    layer = cls(4, 16, init=init)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(1000):
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    u = torch.randn(1, 512, 4)
    with torch.no_grad():
        outputs = [layer(u, mode=mode)[0] for mode in MODES]
    assert torch.isfinite(outputs[0]).all()
    for y in outputs[1:]:
        assert relative_error(y, outputs[0]) < 1e-4


@pytest.mark.parametrize("cls", [S4, S4D, S5])
def test_empty_batch_and_empty_sequence(cls):
    layer = cls(4, 8)
    for mode in MODES:
        assert layer(torch.zeros(2, 0, 4), mode=mode)[0].shape == (2, 0, 4)
        assert layer(torch.zeros(0, 5, 4), mode=mode)[0].shape == (0, 5, 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"state_size": 7}, "even"),
        ({"init": "nonsense"}, "init of s4"),
        ({"discretization": "zoh"}, "discretization of s4"),
        ({"dt_min": 0.0}, "dt_min"),
        ({"n_ssm": 3}, "n_ssm"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"b_clip": 0.0}, "b_clip"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        S4(4, **kwargs)


@pytest.mark.parametrize("length", [1, 7, 65, 130])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["s4", "s4-legt", "s4d-lin", "s5"])
def test_bidirectional_equals_two_dense_runs(name, mode, length):
    layer = make(name, bidirectional=True)
    u = torch.randn(2, length, 4, dtype=torch.float64)
    with torch.no_grad():
        y, state = layer(u, mode=mode)
        assert state is None
        assert relative_error(y, reference.bidirectional_run(layer, u)) < 1e-9
        with pytest.raises(ValueError, match="bidirectional"):
            layer.step(u[:, 0], layer.zero_state(2))


def test_bidirectional_gradients():
    torch.manual_seed(0)
    layer = S4D(2, 4, chunk_size=3, bidirectional=True).double()
    u = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    gradients = []
    for mode in MODES:
        layer.zero_grad()
        layer(u, mode=mode)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for ours in gradients[1:]:
        for a, b in zip(ours, gradients[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_operators_of_the_backward_are_those_of_the_forward():
    """They are made again there, from the parameters that the forward saw, even if those are not the layer's own."""
    torch.manual_seed(0)
    layer, other = S4(2, 4, chunk_size=4).double(), S4(2, 4, chunk_size=4).double()
    u = torch.randn(1, 9, 2, dtype=torch.float64)
    other(u, mode="chunk")[0].square().sum().backward()
    values = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    torch.func.functional_call(layer, values, (u,), {"mode": "chunk"})[0].square().sum().backward()
    for name, p in other.named_parameters():
        torch.testing.assert_close(values[name].grad, p.grad)
    assert all(p.grad is None for p in layer.parameters())


def test_frozen_parameters_get_no_gradient():
    layer = S4(2, 4)
    layer.B.requires_grad_(False)
    u = torch.randn(1, 9, 2)
    layer(u, mode="chunk")[0].sum().backward()
    assert layer.B.grad is None
    assert layer.P.grad is not None


def test_b_clip_limits_the_initial_B():
    torch.manual_seed(0)
    free, clipped = S4(2, 64), S4(2, 64, b_clip=2.0)
    size = torch.complex(*free.B.chunk(2, -1)).abs()
    clipped_size = torch.complex(*clipped.B.chunk(2, -1)).abs()
    assert (size > 2).sum(-1).tolist() == [11, 11]  # of 32, as upstream's clamp
    torch.testing.assert_close(clipped_size, size.clamp(max=2))


def test_s5_blocks_repeat_the_spectrum():
    layer = S5(4, 24, blocks=3)
    spectrum = S5(4, 8).Lambda_im
    assert torch.equal(layer.Lambda_im, spectrum.repeat(3))
    assert layer.zero_state(2).shape == (2, 1, 24)
    with pytest.raises(ValueError, match="blocks"):
        S5(4, 24, blocks=5)
    with pytest.raises(NotImplementedError, match="kernel"):
        layer.kernel(8)


def test_bad_inputs():
    layer = S4(4, 8)
    with pytest.raises(ValueError, match="mode"):
        layer(torch.zeros(1, 3, 4), mode="scan")
    with pytest.raises(ValueError, match="u must be"):
        layer(torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match="initial_state must be"):
        layer(torch.zeros(1, 3, 4), initial_state=torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match="seq_idx must be"):
        layer(torch.zeros(1, 3, 4), seq_idx=torch.zeros(1, 4, dtype=torch.long))


def test_associative_mode_in_float32_with_gradients_and_documents():
    torch.manual_seed(0)
    layer, double = S5(8, 16), S5(8, 16).double()
    double.load_state_dict(layer.state_dict())
    u = torch.randn(1, 3000, 8)
    with torch.no_grad():
        y, state = layer(u, mode="associative")
        expected, expected_state = double(u.double(), mode="recurrent")
        assert relative_error(y, expected) < 1e-5
        assert relative_error(state, expected_state) < 1e-5
        seq_idx = (torch.arange(3000) // 700)[None]
        packed = [layer(u, mode=mode, seq_idx=seq_idx)[0] for mode in ("associative", "chunk")]
        assert relative_error(*packed) < 1e-5
    small = S5(2, 4, chunk_size=3).double()
    inputs = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: small(u, mode="associative"), (inputs,))


def test_associative_mode_is_for_s5():
    with pytest.raises(ValueError, match="associative is for s5"):
        S4(2, 4)(torch.zeros(1, 3, 2), mode="associative")
