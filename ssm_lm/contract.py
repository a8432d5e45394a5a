"""What a state space layer of one's own has to keep, so that everything that stands on it is right: `check_layer`.

    from ssm_lm.contract import check_layer

    def test_my_layer():
        check_layer(MyLayer)

Every claim is a function of the maker of the layer; it raises an AssertionError where the claim does not hold. All of
them together take seconds on a CPU.
"""

import functools
import itertools
import tempfile
from collections.abc import Callable

import torch

from .modeling.state_space import StateSpace

LENGTH = 37  # no whole number of chunks
CHUNK = 8


def check_layer(layer_class: type[StateSpace], hidden_size: int = 6, state_size: int = 8, **arguments) -> None:
    """Hold a layer to the claims of CLAIMS, in float64 on the CPU, and, where it is registered, a small model of it.

    arguments: further ones of its constructor. Raises AssertionError, which begins with the claim that does not hold.
    """
    make = functools.partial(layer_class, hidden_size, state_size, **{"chunk_size": CHUNK} | arguments)
    for claim, check in CLAIMS.items():
        torch.manual_seed(0)
        try:
            check(make)
        except Exception as error:  # whatever a layer does instead of what it should
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            raise AssertionError(f"{layer_class.__name__}: {claim}: {kind}{error}") from error


# ---- the claims


def _modes_agree(make):
    layer, u = _layer_and_input(make)
    expected = layer(u, mode="recurrent")
    for mode in ("chunk", "fft") if layer.is_time_invariant else ("chunk",):
        _same(layer(u, mode=mode), expected, f"mode {mode} and the recurrence")


def _a_cut_changes_nothing(make):
    layer, u = _layer_and_input(make)
    whole = layer(u, mode="recurrent")
    for cut in (1, CHUNK, LENGTH - 1):
        for mode in ("chunk", "recurrent", "auto"):
            first, state = layer(u[:, :cut], mode=mode)
            rest, state = layer(u[:, cut:], mode=mode, initial_state=state)
            _same((torch.cat([first, rest], 1), state), whole, f"mode {mode}, cut after {cut} tokens")


def _a_step_is_a_token(make):
    layer, u = _layer_and_input(make)
    expected, state = layer(u)[0], layer.zero_state(len(u))
    for t in range(3):
        y, state = layer.step(u[:, t], state)
        _same((y,), (expected[:, t],), f"step {t}")


def _documents_are_separate(make):
    layer, u = _layer_and_input(make)
    ends = (0, 5, 6, 20, LENGTH)
    seq_idx = torch.zeros(u.shape[:2], dtype=torch.long)
    for number, start in enumerate(ends[:-1]):
        seq_idx[:, start:] = number
    alone = torch.cat([layer(u[:, a:b])[0] for a, b in itertools.pairwise(ends)], 1)
    for mode in ("chunk", "fft", "recurrent") if layer.is_time_invariant else ("chunk", "recurrent"):
        _same((layer(u, mode=mode, seq_idx=seq_idx)[0],), (alone,), f"mode {mode}, four documents in a row")


def _gradients_agree(make):
    layer, u = _layer_and_input(make)
    found = {}
    for mode in ("recurrent", "chunk"):
        y, _ = layer(u, mode=mode)
        found[mode] = torch.autograd.grad((y * y.detach().cos()).sum(), list(layer.parameters()))
    for (name, _), chunk, recurrent in zip(layer.named_parameters(), found["chunk"], found["recurrent"], strict=True):
        _same((chunk,), (recurrent,), f"gradient of {name}, chunk and recurrent")


def _what_is_left_of_a_state(make):
    layer, u = _layer_and_input(make)
    state = layer(u)[1]
    silence = torch.zeros_like(u)
    if layer.is_time_invariant:
        left = layer.carry_over(layer.transition(LENGTH), state)
        _same((left,), (layer(silence, mode="recurrent", initial_state=state)[1],), f"transition({LENGTH})")
    _same((layer.advance(u, state),), (layer(u, initial_state=state)[1],), "advance and the final state")


def _every_parameter_is_initialised(make):
    layer = make()
    names = {name for name, _ in layer.named_parameters()}
    values = layer.initial_values()
    assert set(values) == names, f"initial_values gives {sorted(values)}, the parameters are {sorted(names)}"
    for name, value in values.items():
        assert value.isfinite().all(), f"initial_values gives {name} a value that is not finite"
    with torch.device("meta"):
        make()  # as from_pretrained makes it, before the weights are there


def _half_precision_leaves_it_alone(make):
    layer = make().to(torch.bfloat16)
    kept = {name: parameter.dtype for name, parameter in layer.named_parameters()}
    assert set(kept.values()) == {torch.float32}, f"after .to(bfloat16) the parameters are {kept}"
    y, state = layer(torch.randn(2, LENGTH, layer.input_size, dtype=torch.bfloat16))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32), f"y is {y.dtype}, the state {state.dtype}"


def _a_model_generates(make):
    model = _model_of(make)
    if model is None:
        return
    prompt = torch.randint(1, model.config.vocab_size, (2, LENGTH))
    ids = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    whole = model(ids, use_cache=False).logits[:, LENGTH - 1 : -1]
    best, chosen = whole.max(-1).values, whole.gather(-1, ids[:, LENGTH:, None])[..., 0]
    assert (best - chosen).max() < 1e-4, "a token of generate() is not the one of a full forward"


def _a_model_is_saved_and_loaded(make):
    from .loading.model import load_model

    model = _model_of(make)
    if model is None:
        return
    ids = torch.randint(1, model.config.vocab_size, (2, LENGTH))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = load_model(folder)
        assert torch.equal(again(ids).logits, model(ids).logits), "the logits of what was saved and loaded differ"


CLAIMS: dict[str, Callable] = {
    "every parameter is initialised": _every_parameter_is_initialised,
    "the modes agree": _modes_agree,
    "a cut of the sequence changes nothing": _a_cut_changes_nothing,
    "a step is a token of the sequence": _a_step_is_a_token,
    "documents in a row are separate": _documents_are_separate,
    "the gradients of chunk and recurrence agree": _gradients_agree,
    "what is left of a state": _what_is_left_of_a_state,
    "half precision leaves it in float32": _half_precision_leaves_it_alone,
    "a model of it generates what its full forwards say": _a_model_generates,
    "a model of it is saved and loaded": _a_model_is_saved_and_loaded,
}


# ---- what they stand on


def _layer_and_input(make) -> tuple[StateSpace, torch.Tensor]:
    """A layer in float64, and u (2, LENGTH, input_size)."""
    layer = make().double()
    return layer, torch.randn(2, LENGTH, layer.input_size, dtype=torch.float64)


def _model_of(make):
    """A model of two layers of it; None where its name is not registered, or the layer takes more than the channels."""
    from . import S4Config, S4ForCausalLM
    from .modeling.ssm import LAYERS

    layer = make()
    if LAYERS.get(layer.name) is not type(layer) or layer.input_size != layer.hidden_size:
        return None
    sizes = {"vocab_size": 60, "hidden_size": layer.hidden_size, "state_size": layer.state_size, "ssm": layer.name}
    return S4ForCausalLM(S4Config(**sizes, num_hidden_layers=1, initializer_range=0.3, arch="s4-ffn")).eval()


def _same(found, expected, where: str, tolerance: float = 1e-9) -> None:
    """Tensors that differ by no more than `tolerance` of the largest value."""
    for ours, theirs in zip(found, expected, strict=True):
        difference = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()
        assert difference <= tolerance, f"{where}: differ by {difference:.1e} of the largest value, {tolerance:.0e} may"
