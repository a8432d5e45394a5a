"""The loss of logits on a GPU: one launch that reads them twice and puts their gradient in their place.

A program has one token: it goes through the vocabulary for the greatest logit and the sum of exponentials, then once
more for the gradient. What PyTorch does in float32, in seven passes, are three in the dtype of the logits. Everything
is float32 between reading and writing. The equation stands in losses.py.
"""

from functools import partial

import torch

from .cross_entropy import IGNORED
from .cross_entropy import logits_to_loss as plain_logits_to_loss
from .kernel_launch import on_device, qualified
from .kernels_s4 import Case

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise

LOWEST = tl.constexpr(-3.0e38)  # below every logit, and finite: the difference of two infinities is no number


@triton.jit
def read(z, bias, v, V, BIAS: tl.constexpr):
    """Logits v of a token, float32; -inf where there are none."""
    x = tl.load(z + v, mask=v < V, other=float("-inf")).to(tl.float32)
    if BIAS:
        x += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)
    return x


@triton.jit
def cross_entropy_kernel(
    z, targets, bias, nll, V, row, BIAS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """nll (n) of logits z (n, V), whose tokens lie `row` numbers apart; then their gradient in z. Grid: n."""
    token = tl.program_id(0).to(tl.int64)
    z += token * row
    target = tl.load(targets + token)
    counts = target >= 0
    # here, for below some threads may write the gradient while others still have to read
    of_target = tl.load(z + target, mask=counts, other=0.0).to(tl.float32)
    if BIAS:
        of_target += tl.load(bias + target, mask=counts, other=0.0).to(tl.float32)
    greatest = tl.full((BLOCK,), LOWEST, tl.float32)  # of every lane; what they hold is put together at the end
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = read(z, bias, start + tl.arange(0, BLOCK), V, BIAS)
        new = tl.maximum(greatest, x)
        total = total * tl.exp(greatest - new) + tl.exp(x - new)
        greatest = new
    top = tl.max(greatest, 0)
    normalizer = top + tl.log(tl.sum(total * tl.exp(greatest - top), 0))
    tl.store(nll + token, tl.where(counts, normalizer - of_target, 0.0))
    if GRADIENT:
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            p = tl.exp(read(z, bias, v, V, BIAS) - normalizer)
            p = tl.where(counts, tl.where(v == target, p - 1, p), 0.0)
            tl.store(z + v, p.to(z.dtype.element_ty), mask=v < V)


# ---- launches


def tiles(V: int) -> dict[str, int]:
    block = min(2048, max(128, triton.next_power_of_2(V)))
    return {"BLOCK": block, "num_warps": max(1, block // 256), "num_stages": 1}


def run(z: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, gradient: bool) -> torch.Tensor:
    """The negative log-likelihood of every token, (n) float32; with `gradient`, z (n, V) becomes that of the logits."""
    n, V = z.shape
    nll = torch.empty(n, dtype=torch.float32, device=z.device)
    if n:
        with on_device(z.device):
            cross_entropy_kernel[n,](
                z,
                targets.contiguous(),
                None if bias is None else bias.contiguous(),
                nll,
                V,
                z.stride(0),
                BIAS=bias is not None,
                GRADIENT=gradient,
                **tiles(V),
            )
    return nll


# what the compiler sees
cross_entropy_ = torch.library.custom_op(qualified("cross_entropy_"), run, mutates_args=("z",))


@cross_entropy_.register_fake
def _(z, targets, bias, gradient):
    return torch.empty(len(z), dtype=torch.float32, device=z.device)


def logits_to_loss(z, targets, bias=None, gradient=True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`cross_entropy.logits_to_loss` by the kernel, but that the gradient is in z, in its dtype."""
    z = z if z.stride(1) == 1 else z.contiguous()
    total = cross_entropy_(z, targets, bias, gradient).sum()
    return total, z if gradient else None


# ---- what the registry asks for


TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# what models have: the dtype of logits and bias, or None for the latter, and the entries of the vocabulary
PROBLEMS = [(torch.float32, torch.float32, 3001), (torch.bfloat16, torch.float32, 3001), (torch.bfloat16, None, 4096)]


def self_check_cases(device: torch.device, *problem) -> list[Case]:
    """Of one problem, as PROBLEMS lists them, or of all of these."""
    return [_case(device, *each) for each in ([problem] if problem else PROBLEMS)]


def _case(device, dtype, of_bias, V) -> Case:
    """The first, the middle and the last entry are asked for; one token does not count."""
    generator, n = torch.Generator().manual_seed(0), 4
    z = (4 * torch.randn(n, V, generator=generator)).to(device, dtype)
    bias = None if of_bias is None else torch.randn(V, generator=generator).to(device, of_bias)
    targets = torch.tensor([0, V // 2, V - 1, IGNORED], device=device)

    def run(loss, cast):
        return list(loss(cast(z.clone()), targets, None if bias is None else cast(bias)))

    label = f"the loss of logits in {str(dtype).removeprefix('torch.')}{'' if of_bias is None else ' with a bias'}"
    ours, twin = partial(run, logits_to_loss, lambda x: x), partial(run, plain_logits_to_loss, torch.Tensor.double)
    return Case(label, ours, twin, TOLERANCES[dtype])
