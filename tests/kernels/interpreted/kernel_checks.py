"""What every interpreted test of a kernel asks: the same numbers as its twin in float64, forward and backward."""

import torch

from ssm_lm.modeling.kernels_s4 import self_check


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


def assert_the_same_bits_again(function, inputs) -> None:
    """Outputs and gradients of `function(*inputs)`, a tensor or several, twice; gradients of all inputs that ask."""
    wanted, results = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad], []
    for _ in range(2):
        outputs = function(*inputs)
        outputs = (outputs,) if torch.is_tensor(outputs) else outputs
        weights = [x.cos().detach() for x in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, wanted, weights)])
    assert all(map(torch.equal, *results))


def assert_as_near_as_pytorch(layer, function, wanted, tolerance: float) -> None:
    """Outputs and gradients of function(layer) by the kernel are off from those in float64 by at most twice what
    PyTorch is in float32, and `tolerance`. wanted: the names of the parameters.
    """
    found = []
    for kernels, dtype in (("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        layer.to(dtype)
        layer.kernels = kernels
        outputs = function(layer)
        torch.manual_seed(1)
        weights = [torch.randn(x.shape).to(dtype) for x in outputs]
        parameters = [p for name, p in layer.named_parameters() if name in wanted]
        found.append([*outputs, *torch.autograd.grad(outputs, parameters, weights)])
    for ours, plain, exact in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        assert relative_error(ours, exact) < tolerance + 2 * relative_error(plain, exact)


def compare_in_a_model(model, parts, ids, autocast: bool, tolerance: float) -> None:
    """The model's loss and gradients where `parts`, modules of it, run their kernels and where they do not."""
    results = []
    for kernels in ("torch", "triton"):
        for part in parts:
            part.kernels = kernels
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, theirs in zip(*reversed(results), strict=True):
        assert_close(ours, theirs, tolerance)


def assert_passes(self_check_cases) -> None:
    """The self-check of all problems, by a margin that is none of 0 and 1 tolerances."""
    cause, worst = self_check(self_check_cases, torch.device("cpu"))
    assert cause is None
    assert 0 < worst < 1
