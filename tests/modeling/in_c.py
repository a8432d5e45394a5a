"""What the tests of the C libraries share: skipped without one, calls by name, memory with a frame, distances."""

import pytest
import torch

from ssm_lm.modeling import native_library, native_tokens

MARGIN = 64


def needs(name: str):
    """A mark for tests of a library."""
    why = native_library.why_not(name)
    return pytest.mark.skipif(why is not None, reason=f"no library: {why}")


def searched(monkeypatch, tell) -> None:
    """tell(room, tokens) from now on for every run of greedy search in the library: for how many, and how many came."""
    search = native_tokens.TokenProgram.search

    def told(self, cache, rules, length, room, *given):
        found = search(self, cache, rules, length, room, *given)
        tell(room, found.shape[1])
        return found

    monkeypatch.setattr(native_tokens.TokenProgram, "search", told)


def called_names(monkeypatch, module) -> list[str]:
    """The names of the library's functions, as `module` calls them from now on."""
    names, call = [], module._call
    monkeypatch.setattr(module, "_call", lambda name, *given: names.append(name) or call(name, *given))
    return names


class Frames:
    """Memory for a library, full of NaN, and as much around it."""

    def __init__(self):
        self.kept = []

    def memory(self, dtype: torch.dtype = torch.float32):
        """Stands for `native_library.floats` or `doubles`."""

        def framed(*shape):
            size = torch.Size(shape).numel()
            self.kept.append(torch.full((size + 2 * MARGIN,), float("nan"), dtype=dtype))
            return self.kept[-1][MARGIN : MARGIN + size].view(shape)

        return framed

    def check(self, count: int) -> None:
        """So many were asked for, and nothing was written around them."""
        assert len(self.kept) == count
        for around in self.kept:
            assert around[:MARGIN].isnan().all()
            assert around[-MARGIN:].isnan().all()


def difference(ours, expected) -> float:
    return ((ours.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
