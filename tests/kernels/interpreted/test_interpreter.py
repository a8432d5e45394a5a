"""The repaired interpreter against torch, on what Triton's own gets wrong."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def bfloat16_kernel(x_ptr, y_ptr, out_ptr, sum_ptr, dot_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    offsets = i[:, None] * SIZE + i[None, :]
    x = tl.load(x_ptr + offsets)
    y = tl.load(y_ptr + offsets)
    tl.store(out_ptr + offsets, x * y + x)
    tl.store(sum_ptr + i, tl.sum(x, 1))
    tl.store(dot_ptr + offsets, tl.dot(x, y))


def test_bfloat16_rounds_as_torch_does():
    x, y = torch.randn(2, 16, 16, dtype=torch.bfloat16)
    out, sums, product = torch.empty_like(x), torch.empty(16, dtype=torch.bfloat16), torch.empty(16, 16)
    bfloat16_kernel[(1,)](x, y, out, sums, product, SIZE=16)
    assert torch.equal(out, x * y + x)
    torch.testing.assert_close(sums.float(), x.double().sum(1).float(), rtol=2**-8, atol=1e-2)
    torch.testing.assert_close(product, x.float() @ y.float())


@triton.jit
def compose(a, b, c, d):
    return a * c, b * c + d


@triton.jit
def scan_kernel(a_ptr, b_ptr, out_ptr, total_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REVERSE: tl.constexpr):
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    a = tl.load(a_ptr + offsets)
    b = tl.load(b_ptr + offsets)
    _, x = tl.associative_scan((a, b), 0, compose, reverse=REVERSE)
    tl.store(out_ptr + offsets, x)
    _, total = tl.reduce((a, b), 0, compose)
    tl.store(total_ptr + tl.arange(0, COLUMNS), total)


@pytest.mark.parametrize("reverse", [False, True])
def test_scans_and_reductions_with_a_combine_function(reverse):
    a, b = torch.rand(16, 4), torch.randn(16, 4)
    out, total = torch.empty(16, 4), torch.empty(4)
    scan_kernel[(1,)](a, b, out, total, ROWS=16, COLUMNS=4, REVERSE=reverse)
    state, expected = torch.zeros(4), torch.empty(16, 4)
    for t in reversed(range(16)) if reverse else range(16):
        state = expected[t] = a[t] * state + b[t]
    torch.testing.assert_close(out, expected)
    state = torch.zeros(4)
    for t in range(16):
        state = a[t] * state + b[t]
    torch.testing.assert_close(total, state)


@triton.jit
def mask_kernel(x_ptr, out_ptr, count, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    wanted = tl.program_id(0).to(tl.int64) < count
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=(i < 3) & wanted, other=0.0))


@pytest.mark.parametrize("count", [0, 1])
def test_a_scalar_comparison_in_a_mask(count):
    x, out = torch.randn(8), torch.empty(8)
    mask_kernel[(1,)](x, out, count, SIZE=8)
    assert torch.equal(out, torch.where(torch.arange(8) < 3 * count, x, 0.0))


def test_uninitialised_memory_is_poisoned():
    like = torch.zeros(3)
    for x in (torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty_strided((3,), (1,))):
        assert x.isnan().all()
