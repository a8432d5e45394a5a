"""What every interpreted test of a kernel asks: the same numbers as its twin in float64, forward and backward."""

import torch


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value; NaN where either has one."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str = "output") -> None:
    error = relative_error(actual, expected)
    assert error < tolerance, f"{name}: relative error {error:.1e}, tolerance {tolerance:.0e}"  # a NaN fails


def gapped(x: torch.Tensor) -> torch.Tensor:
    """The same values with other strides: every second row, column, ... of a tensor that holds NaN in between."""
    wide = x.new_full([2 * size + 1 for size in x.shape], torch.nan)
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)


def _leaves(inputs, dtype=None):
    """Copies that can take gradients. Tensors of floats are moved to `dtype`, with their strides; the rest stays."""
    result = []
    for x in inputs:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            wants_grad = x.requires_grad
            x = x.detach() if dtype is None else x.detach().to(dtype)
            x = x.requires_grad_(wants_grad)
        result.append(x)
    return result


def compare_with_twin(kernel, twin, inputs, tolerance: float, grad_tolerance: float | None = None) -> None:
    """Outputs and gradients of `kernel(*inputs)` against those of `twin(*inputs in float64)`.

    Both return a tensor or a tuple of tensors (None allowed). Gradients are taken of every input that requires them,
    for random gradients of every output, the same on both sides.
    """
    generator = torch.Generator().manual_seed(1)
    results = []
    for function, arguments in ((kernel, _leaves(inputs)), (twin, _leaves(inputs, torch.float64))):
        outputs = function(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results.append((arguments, [x for x in outputs if x is not None]))
    (arguments, outputs), (twin_arguments, twin_outputs) = results
    assert len(outputs) == len(twin_outputs)
    for index, (actual, expected) in enumerate(zip(outputs, twin_outputs, strict=True)):
        assert_close(actual, expected, tolerance, f"output {index}")

    wanted = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.requires_grad]
    differentiable = [i for i, x in enumerate(outputs) if x.requires_grad]
    if not wanted or not differentiable:
        return
    grads = [torch.randn(outputs[i].shape, generator=generator).to(outputs[i].dtype) for i in differentiable]

    def gradients(outputs, arguments):
        outputs = [outputs[i] for i in differentiable]
        weights = [g.to(x.dtype) for g, x in zip(grads, outputs, strict=True)]
        return torch.autograd.grad(outputs, [arguments[i] for i in wanted], weights)

    pairs = zip(wanted, gradients(outputs, arguments), gradients(twin_outputs, twin_arguments), strict=True)
    for index, actual, expected in pairs:
        assert_close(actual, expected, grad_tolerance or tolerance, f"gradient of input {index}")
