"""The discrete systems of S4 and S4D in C against their twins, when they run, and when they do not."""

import pytest
import torch
from in_c import Frames, called_names, difference, needs
from torch.autograd import forward_ad

from ssm_lm.modeling import native_systems
from ssm_lm.modeling.diagonal_discretization import diagonal_system
from ssm_lm.modeling.dplr_discretization import bilinear_dplr
from ssm_lm.modeling.real_form import apply_diagonal, powers, real_form
from ssm_lm.modeling.ssm import S4, S4D

pytestmark = needs("systems")


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(native_systems, "SMALLEST", 0)


def parameters(H, S, N, rank=None, dt=(1e-4, 1.0)):
    """Steps over four decades; rates that make |dt Lambda| anything from 1e-9 to many turns."""
    torch.manual_seed(0)
    log_dt = torch.empty(H).uniform_(*dt).log()
    log_re, im = 8 * torch.randn(S, N // 2) - 6, 300 * torch.randn(S, N // 2) ** 3
    P = () if rank is None else (torch.randn(rank, S, N),)
    return log_dt, log_re.clamp(max=3), im, *P, torch.randn(S, N), torch.randn(H, N)


SIZES = [(1, 1, 2), (3, 3, 64), (6, 2, 10), (5, 1, 34)]


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(("H", "S", "N"), SIZES)
def test_dplr(H, S, N, rank):
    """Against the twin in float64."""
    given = parameters(H, S, N, rank)
    ours, theirs = native_systems.native_dplr_system(*given), bilinear_dplr(*(x.double() for x in given))
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert one.dtype == torch.float32
        assert difference(one, other) < 1e-7


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(("H", "S", "N"), SIZES)
def test_gradients_of_dplr(H, S, N, rank):
    """Of every parameter, against the twin's in float64."""
    given = [x.requires_grad_() for x in parameters(H, S, N, rank)]
    doubled = [x.detach().double().requires_grad_() for x in given]
    ours, theirs = native_systems.native_dplr_system(*given), bilinear_dplr(*doubled)
    weights = [torch.randn_like(x) for x in ours]
    found = torch.autograd.grad(ours, given, weights)
    expected = torch.autograd.grad(theirs, doubled, [x.double() for x in weights])
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert difference(one, other) < 2e-7


def test_gradients_where_few_are_asked_for_and_of_second_order():
    given = parameters(6, 2, 10, 2)
    given[4].requires_grad_()
    (found,) = torch.autograd.grad(native_systems.native_dplr_system(*given).B_bar.sum(), given[4], create_graph=True)
    (expected,) = torch.autograd.grad(bilinear_dplr(*given).B_bar.sum(), given[4])
    torch.testing.assert_close(found, expected)
    with torch.enable_grad():
        given[3].requires_grad_()
        of_P = []
        for make in (native_systems.native_dplr_system, bilinear_dplr):
            (of_B,) = torch.autograd.grad(make(*given).B_bar.square().sum(), given[4], create_graph=True)
            of_P.append(torch.autograd.grad(of_B.square().sum(), given[3])[0])
    torch.testing.assert_close(*of_P, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [S4, S4D])
def test_derivatives_forward_go_through_the_twins(kind):
    layer, u = kind(8, 16), torch.randn(1, 5, 8)
    found = []
    for kernels in ("torch", "auto"):
        layer.kernels = kernels
        with torch.no_grad(), forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(x.detach(), torch.ones_like(x)) for name, x in layer.named_parameters()}
            y, _ = torch.func.functional_call(layer, dual, (u,), {"mode": "recurrent"})
            found.append(forward_ad.unpack_dual(y).tangent)
    assert found[1] is not None
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(("H", "S", "N"), SIZES)
def test_dplr_numbers(H, S, N, rank):
    """They, E and what channels share are all of the system, by the equations of native_systems_source.py."""
    *given, C = (x.double() for x in parameters(H, S, N, rank))
    expected = bilinear_dplr(*given, C)
    P, B = (x.tile(H // S, 1) for x in given[-2:])
    numbers = native_systems.native_dplr_numbers(*(x.float() for x in given)).double()
    half_dt, of_u, mix = numbers[:, :1], numbers[:, 1 : 1 + rank], numbers[:, 1 + rank :].unflatten(1, (rank, rank))
    w = (expected.E + real_form(torch.ones(N // 2, dtype=torch.complex64))) / 2
    F = 4 * torch.einsum("rhn,hrk->hnk", apply_diagonal(w, P), mix)
    assert difference(F, expected.F) < 2e-7
    drive = 2 * half_dt * B - 2 * torch.einsum("rhn,hr->hn", P, of_u)
    assert difference(apply_diagonal(w, drive), expected.B_bar) < 2e-7


@torch.no_grad()
@pytest.mark.parametrize(("H", "S", "N"), SIZES)
def test_diagonal(H, S, N):
    """Against the twin, which is in float64, and of each number by itself: poles near zero lose no digits."""
    given = parameters(H, S, N)
    ours = native_systems.native_diagonal_system(*given)
    log_re, log_im, *CB = diagonal_system(*(x.double() for x in given))
    torch.testing.assert_close(ours.log_re, log_re, rtol=1e-14, atol=0)
    torch.testing.assert_close(ours.log_im, log_im, rtol=1e-14, atol=0)
    size = torch.hypot(*CB)
    for one, other in zip((ours.CB_re, ours.CB_im), CB, strict=True):
        assert ((one - other).abs() <= 1e-7 * size).all()
    Lambda_bar = torch.cat(powers(log_re, log_im, torch.ones(())), -1)
    torch.testing.assert_close(ours.Lambda_bar.double(), Lambda_bar, rtol=1e-7, atol=1e-7)
    assert torch.equal(ours.row, 2 * torch.cat([ours.CB_re, -ours.CB_im], -1))


def all_of_them():
    """What makes something, of which parameters, the last of them C, and how many tensors it is."""
    return (
        (native_systems.native_dplr_system, parameters(6, 3, 10, 2), 5),
        (lambda *given: (native_systems.native_dplr_numbers(*given[:-1]),), parameters(6, 3, 10, 2), 1),
        (native_systems.native_diagonal_system, parameters(6, 3, 10), 6),
    )


def gradients(*given):
    """Of all that comes of a system, in the parameters."""
    with torch.enable_grad():
        given = [x.detach().requires_grad_() for x in given]
        made = native_systems.native_dplr_system(*given)
    return torch.autograd.grad(made, given, [torch.ones_like(x) for x in made])


def test_the_same_bits_of_gradients(any_threads):
    given, results = parameters(6, 3, 10, 2), []
    for number in (1, 2, 7):
        torch.set_num_threads(number)
        results.append(gradients(*given))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_the_same_bits(any_threads):
    """Twice, by any number of threads, and of a channel among others."""
    for make, given, _ in all_of_them():
        results = []
        for number, chosen in ((1, slice(0, 6)), (2, slice(0, 6)), (7, slice(0, 6)), (2, slice(3, 6))):
            torch.set_num_threads(number)
            log_dt, *shared, C = given
            results.append([x[-1] for x in make(log_dt[chosen], *shared, C[chosen])])
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def test_memory(monkeypatch):
    """Nothing is written beside what was asked for, and nothing is read that was not written; parameters may lie
    anyhow."""
    frames, cases = Frames(), [*all_of_them(), (gradients, parameters(6, 3, 10, 2), 5 + 6)]
    expected = [make(*given) for make, given, _ in cases]
    monkeypatch.setattr(native_systems, "floats", frames.memory())
    monkeypatch.setattr(native_systems, "doubles", frames.memory(torch.float64))
    for (make, given, _), wanted in zip(cases, expected, strict=True):
        found = make(*(x.mT.contiguous().mT if x.dim() > 1 else x for x in given))
        assert all(map(torch.equal, wanted, found))
    frames.check(sum(count for *_, count in cases))


@pytest.mark.parametrize(("kind", "options"), [(S4, {}), (S4, {"init": "legt"}), (S4D, {})], ids=str)
def test_when_it_runs(kind, options, monkeypatch):
    """In float32, for a known rule, S4D's without gradients; what it gives is what the layer has without it."""
    names = called_names(monkeypatch, native_systems)
    layer = kind(8, 16, **options)
    layer.kernels = "torch"
    expected = layer.discretize()
    assert not names
    layer.kernels = "auto"
    found = layer.discretize()
    assert found[0].requires_grad
    assert len(names) == (kind is S4)
    names.clear()
    with torch.no_grad():
        found = layer.discretize()
        assert len(names) == 1
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        layer._system(False)
        assert len(names) == 2
        layer.double().discretize()
        layer.float().kernels = "torch"
        layer.discretize()
        layer.kernels = "auto"
        monkeypatch.setattr(native_systems, "SMALLEST", 8 * 16 + 1)
        layer.discretize()
    assert len(names) == 2


def test_a_bilinear_diagonal_is_left_alone(monkeypatch):
    names = called_names(monkeypatch, native_systems)
    with torch.no_grad():
        S4D(8, 16, discretization="bilinear").discretize()
    assert not names
