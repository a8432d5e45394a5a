"""Cross-entropy of a linear head that never holds the logits of all tokens, and the head that offers it.

    nll_t = logsumexp_v(z_tv) - z_(t, y_t),   z_t = W h_t + b        d nll_t / d z_tv = softmax(z_t)_v - [v = y_t]

The logits of B L tokens over V entries are the largest tensor of a language model, and the plain loss holds several of
them: in the model's dtype, in float32, their log-softmax, their gradient. Here they exist for a chunk of tokens at a
time, in one buffer that becomes logits, exponentials and gradient in turn (cross_entropy.py). The gradients of h, W
and b are sums over tokens of matmuls with the gradient of the logits, so they are formed in the same pass, while the
chunk is there: the backward recomputes nothing and needs no weights, which a ZeRO 3 engine would have given back by
then.

Source: the idea is that of Liger's fused linear cross entropy (Hsu et al. 2024), which runs on a GPU where the package
is installed and our kernel does not. It takes far fewer tokens at a time, and so reads the weights and writes their
gradient more often.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .cross_entropy import IGNORED
from .first_order import first_order
from .kernel_limits import limit_of_cross_entropy
from .ops import CROSS_ENTROPY, logits_to_loss

# logits at a time where no chunk size is given, in elements: 128 MiB in float32, 1024 tokens of a vocabulary of 32,768
CHUNK_ELEMENTS = 1 << 25


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, chunk_size, run_kernel):
        device = hidden.device.type
        exact = torch.promote_types(dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(device, enabled=False):
            w = weight.to(dtype)
            grad_hidden = torch.empty_like(hidden, dtype=dtype) if needs_hidden else None
            # the sum over chunks is kept in float32; the parameter's dtype rounds it once, at the end
            grad_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
            grad_bias = torch.zeros_like(bias, dtype=exact) if needs_bias else None
            total = torch.zeros((), dtype=exact, device=hidden.device)
            for start in range(0, hidden.shape[0], chunk_size):
                part = slice(start, start + chunk_size)
                h = hidden[part].to(dtype)
                wanted = needs_hidden or needs_weight or needs_bias
                of_part, z = logits_to_loss(h @ w.t(), targets[part], bias, wanted, run_kernel)
                total += of_part
                if not wanted:
                    continue
                if needs_bias:
                    grad_bias += z.sum(0, dtype=exact)
                z = z.to(dtype)
                if needs_hidden:
                    torch.mm(z, w, out=grad_hidden[part])
                if needs_weight and dtype == exact:
                    grad_weight.addmm_(z.t(), h)
                elif needs_weight:
                    grad_weight += z.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @first_order
    def backward(ctx, grad_total):
        scaled = (
            None if grad is None else (grad * grad_total).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None


def _dtype_of_product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """As F.linear would: an autocast region, or else the model's dtype, decides how the matmuls are computed."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    chunk_size: int | None = None,
    kernels: str = "auto",
) -> torch.Tensor:
    """The summed negative log-likelihood of `targets` under softmax(hidden weight^T + bias).

    hidden (n, d), weight (V, d), bias (V) or None, of any floating dtype; targets (n), int64, -100 where there is no
    loss. chunk_size: tokens whose logits exist at a time; None: as many as make CHUNK_ELEMENTS logits. kernels: as in
    S4Config.
    Returns a scalar, float32 (float64 for float64 inputs), differentiable once with respect to the first three.
    """
    dtype = _dtype_of_product(hidden, weight)
    problem = dtype, None if bias is None else bias.dtype, len(weight)
    unsupported = limit_of_cross_entropy(dtype)
    run_kernel = CROSS_ENTROPY.runs_kernel(hidden, weight, unsupported=unsupported, setting=kernels, problem=problem)
    fused = _liger() if hidden.is_cuda and not run_kernel and hidden.dtype != torch.float64 else None
    if fused is not None:
        if torch.is_autocast_enabled(hidden.device.type):  # the kernel takes its operands as they are
            hidden, weight, bias = (None if x is None else x.to(dtype) for x in (hidden, weight, bias))
        return fused(hidden, weight, targets, bias=bias, ignore_index=IGNORED, reduction="sum")
    if chunk_size is None:
        chunk_size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return _ChunkedLinearCrossEntropy.apply(hidden, weight, bias, targets, dtype, chunk_size, run_kernel)


def _liger():
    """Liger's fused kernel, or None where the package is missing or cannot run."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except Exception:  # ImportError, and whatever a Triton that does not fit raises
        return None
    return liger_fused_linear_cross_entropy


def kept_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Of hidden states (B, L, H) those whose logits are asked for.

    logits_to_keep: an int, the last so many, 0 for all; indices (K,), the same for all rows, or (B, K); or a mask
    (B, L) of bool, whose positions come as (K, H). Older versions of transformers have none of their own.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dtype == torch.bool and logits_to_keep.dim() == 2:
        return hidden_states[logits_to_keep]
    if logits_to_keep.dim() == 2:
        return hidden_states.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden_states.shape[-1]))
    return hidden_states[:, logits_to_keep]


def causal_targets(labels: torch.Tensor, shift_labels: torch.Tensor | None = None) -> torch.Tensor:
    """labels (B, L) -> the target of every position, (B L): the next label, none for the last position.

    shift_labels (B, L): the targets, where the caller has shifted already.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    return shift_labels.reshape(-1)


def average(summed: torch.Tensor, targets: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """The mean over the targets that count, or over num_items_in_batch of them where a batch is accumulated."""
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORED).sum()
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(summed.device)
    return summed / num_items_in_batch


class LanguageModelHead(nn.Linear):
    """A linear head that returns logits, or, where targets are given, their summed loss without the logits.

    Both in forward: engines that shard parameters (ZeRO 3, FSDP) gather a module's own around its forward.
    """

    kernels = "auto"  # as in S4Config.kernels

    def forward(self, hidden_states, targets=None, chunk_size=None):
        """hidden_states (..., H) -> logits (..., V); with targets (n) and hidden_states (n, H): a scalar."""
        if targets is None:
            return super().forward(hidden_states)
        return linear_cross_entropy(hidden_states, self.weight, targets, self.bias, chunk_size, self.kernels)
