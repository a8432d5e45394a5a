"""SSD: its modes equal one another and the definition, a sum over all pairs of tokens in complex numbers."""

import pytest
import torch

from ssm_lm.modeling.ssd import SSD

H, N, P = 12, 8, 4  # 3 heads


def make(selective, dtype=torch.float64, **keys):
    torch.manual_seed(0)
    layer = SSD(H, N, head_dim=P, selective=selective, dt_min=0.01, dt_max=0.5, **keys).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():  # heads and states that differ, norms that are not 1
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def sum_over_pairs(layer, u, state):
    """y_i = D v_i + sum_{j<=i} Re<Lambda^(s_i - s_j) b_j, c_i> dt_j v_j + Re<Lambda^(s_i) S_0, c_i>; the last state."""
    half = N // 2

    def pairs(z):
        return torch.complex(z[..., :half], z[..., half:])

    def normed(z, scale, bias):
        return pairs(z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale + bias)

    v, b, c, raw = u[..., :H], u[..., H : H + N], u[..., H + N : H + 2 * N], u[..., H + 2 * N :]
    v = v.unflatten(-1, (-1, P))
    b, c = normed(b, layer.B_scale, layer.B_bias), normed(c, layer.C_scale, layer.C_bias)
    dt = layer.log_dt.exp().expand(*u.shape[:2], -1)
    if layer.selective:
        dt = torch.log1p(dt.expm1() * raw.exp())  # softplus(raw + softplus^-1(dt))
    s = dt.cumsum(1)  # (B, L, E)
    Lambda = torch.complex(-layer.Lambda_log_re.exp()[:, None].expand(-1, half), layer.Lambda_im.expand(H // P, -1))
    apart = s[:, :, None] - s[:, None]  # (B, i, j, E)
    causal = torch.ones(u.shape[1], u.shape[1], dtype=torch.bool).tril()[..., None]
    reach = torch.exp(Lambda * apart.masked_fill(~causal, torch.inf)[..., None].clamp(max=1e4))
    y = torch.einsum("bijen,bjn,bin,bje,bjep->biep", reach, b, c.conj(), dt + 0j, v + 0j).real
    start = pairs(state).unflatten(1, (-1, P))
    y = y + torch.einsum("bien,bepn,bin->biep", torch.exp(Lambda * s[..., None]), start, c.conj()).real
    end = torch.exp(Lambda * (s[:, -1:] - s)[..., None])
    last = torch.einsum("bjen,bjn,bje,bjep->bepn", end, b, dt + 0j, v + 0j)
    last = last + torch.exp(Lambda * s[:, -1, :, None])[:, :, None] * start
    return y.flatten(2) + layer.D * u[..., :H], torch.cat([last.real, last.imag], -1).flatten(1, 2)


@pytest.mark.parametrize("selective", [False, True], ids=["constant", "selective"])
@pytest.mark.parametrize("init", ["lin", "lin+real"])
@pytest.mark.parametrize("length", [1, 8, 37])
def test_modes_equal_the_definition(selective, init, length):
    """Output, final state, and the gradients of the input, the first state and every parameter."""
    layer = make(selective, chunk_size=8, init=init)
    u = torch.randn(2, length, layer.input_size, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, H, N, dtype=torch.float64, requires_grad=True)
    wanted = [u, state, *layer.parameters()]

    def everything(y, final):
        return [y, final, *torch.autograd.grad(y.sin().sum() + final.cos().sum(), wanted)]

    expected = everything(*sum_over_pairs(layer, u, state))
    for mode in ("chunk", "recurrent"):
        for ours, theirs in zip(everything(*layer(u, mode=mode, initial_state=state)), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("selective", [False, True], ids=["constant", "selective"])
def test_split_at_every_point_and_step(selective):
    layer = make(selective, chunk_size=8)
    u = torch.randn(2, 27, layer.input_size, dtype=torch.float64)
    start = torch.randn(2, H, N, dtype=torch.float64)
    with torch.no_grad():
        whole, final = layer(u, mode="chunk", initial_state=start)
        for cut in range(28):
            first, state = layer(u[:, :cut], mode="chunk", initial_state=start)
            second, last = layer(u[:, cut:], mode="chunk", initial_state=state)
            torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(last, final, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer.advance(u, start), final, rtol=1e-9, atol=1e-9)
        y, state = layer.step(u[:, 0], start)
        torch.testing.assert_close(y, whole[:, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["chunk", "recurrent"])
@pytest.mark.parametrize("selective", [False, True], ids=["constant", "selective"])
def test_documents_do_not_meet(selective, mode):
    """Each document as if alone, the row's first from the initial state; the state after padding is zero."""
    layer = make(selective, chunk_size=8)
    u = torch.randn(2, 30, layer.input_size, dtype=torch.float64)
    start = torch.randn(2, H, N, dtype=torch.float64)
    runs = [[(0, 3), (3, 14), (14, 30)], [(0, 17), (17, 24), (24, 30)]]
    seq_idx = torch.zeros(2, 30, dtype=torch.long)
    for row, spans in enumerate(runs):
        for number, (first, end) in enumerate(spans):
            seq_idx[row, first:end] = number
    seq_idx[1, 24:] = -1
    with torch.no_grad():
        y, final = layer(u, mode=mode, initial_state=start, seq_idx=seq_idx)
        for row, spans in enumerate(runs):
            for first, end in spans[: 2 if row else 3]:
                state = start[row : row + 1] if first == 0 else None
                alone, last = layer(u[row : row + 1, first:end], mode="recurrent", initial_state=state)
                torch.testing.assert_close(y[row, first:end], alone[0], rtol=1e-9, atol=1e-9)
                if end == 30:
                    torch.testing.assert_close(final[row], last[0], rtol=1e-9, atol=1e-9)
    assert final[1].abs().max() == 0


def test_float32_keeps_its_digits_over_8192_tokens():
    """Angles of thousands of turns, against the recurrence in float64."""
    double = make(False)
    single = make(False, torch.float32)
    single.load_state_dict(double.state_dict())
    double.load_state_dict(single.state_dict())
    u = torch.randn(1, 8192, single.input_size)
    with torch.no_grad():
        expected, expected_state = double(u.double(), mode="recurrent")
        for mode in ("chunk", "recurrent"):
            y, state = single(u, mode=mode)
            assert ((y - expected).abs().amax((0, 1)) / expected.abs().amax((0, 1))).max() < 1e-4
            assert (state - expected_state).abs().max() / expected_state.abs().max() < 1e-4


def test_transition_is_what_the_tokens_leave_of_a_state():
    for selective in (False, True):
        layer = make(selective)
        state = torch.randn(2, H, N, dtype=torch.float64)
        u = torch.randn(2, 21, layer.input_size, dtype=torch.float64)
        u[..., :H] = 0  # no values: nothing drives the state
        with torch.no_grad():
            left = layer.carry_over(layer.transition_over(u), state)
            torch.testing.assert_close(left, layer.advance(u, state), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="depends on its input"):
        make(True).transition(21)


def test_heads_take_initialisations_in_turns():
    lin, real, both = (SSD(H, N, init=init, head_dim=P).initial_values() for init in ("lin", "real", "lin+real"))
    assert both["Lambda_im"].shape == (H // P, N // 2)
    assert lin["Lambda_im"].shape == (N // 2,)
    for head, kind in enumerate((lin, real, lin)):
        assert torch.equal(both["Lambda_im"][head], kind["Lambda_im"])
        assert both["Lambda_log_re"][head] == kind["Lambda_log_re"][head]


def test_what_makes_no_ssd():
    for keys, said in (
        ({"head_dim": 5}, "head_dim must divide the channels of an ssd .12., and 5 does not"),
        ({"bidirectional": True}, "reads its input from the front"),
        ({"init": "legs"}, "init of ssd is one of rope, lin, real, lin.real"),
    ):
        with pytest.raises(ValueError, match=said):
            SSD(H, N, **({"head_dim": P} | keys))
    layer = make(False)
    with pytest.raises(ValueError, match=r"u must be \(batch, length, 28\)"):
        layer(torch.zeros(1, 3, H))
    with pytest.raises(ValueError, match="mode fft is for time-invariant layers"):
        layer(torch.zeros(1, 3, 28), mode="fft")
