"""A state space layer by itself: it learns an unknown filter from its input and output, and then runs sample by sample.

    python examples/layer_on_a_signal.py

The filter is a damped resonance, y_t = 2 r cos(w) y_(t-1) - r^2 y_(t-2) + u_t: one pair of complex poles, so a state
space of order 2 can be equal to it; here it has order 4. Ten seconds on one core.
"""

import math

import torch

from ssm_lm.modeling.ssm import S4D


def resonance(u: torch.Tensor, radius: float = 0.95, angle: float = 0.3) -> torch.Tensor:
    """The unknown filter. u, y: (batch, length, 1)."""
    y = torch.zeros(u.shape[0], u.shape[1] + 2, 1)
    for t in range(u.shape[1]):
        y[:, t + 2] = 2 * radius * math.cos(angle) * y[:, t + 1] - radius**2 * y[:, t] + u[:, t]
    return y[:, 2:]


def main(steps: int = 300) -> dict[str, float]:
    """Learn the filter; returns the share of the signal that is missed before and after, and what streaming changes."""
    torch.manual_seed(0)
    layer = S4D(hidden_size=1, state_size=4, init="lin", dt_min=0.05, dt_max=0.2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    u = torch.randn(8, 256, 1)
    y = resonance(u)
    missed = []
    for _ in range(steps):
        guess, _ = layer(u, output_final_state=False)  # all 256 samples at once
        loss = (guess - y).square().mean() / y.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        missed.append(loss.item())
    print(f"missed after 1 step {missed[0]:.1%}, after {steps} steps {missed[-1]:.2%} of the signal's power")

    with torch.no_grad():  # the same layer as a filter that is fed one sample after the other
        fresh = torch.randn(1, 2000, 1)
        at_once, _ = layer(fresh)
        state, stream = layer.zero_state(1), []
        for t in range(fresh.shape[1]):
            sample, state = layer.step(fresh[:, t], state)
            stream.append(sample)
    difference = ((torch.stack(stream, 1) - at_once).abs().max() / at_once.abs().max()).item()
    print(f"sample by sample, with a state of {state.numel()} numbers: the same to {difference:.0e}")
    return {"before": missed[0], "after": missed[-1], "streaming": difference}


if __name__ == "__main__":
    main()
