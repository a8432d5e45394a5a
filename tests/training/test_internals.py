"""What the package reaches into in other libraries is there: an upgrade that takes a part away fails by its name."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from ssm_lm import internals
from tests.test_structure import PACKAGE, defined, private_uses

FILES = sorted(path.stem for path in (PACKAGE / "internals").glob("*.py") if path.stem != "__init__")
PARTS = {part.name: part for file in FILES for part in importlib.import_module(f"ssm_lm.internals.{file}").PARTS}
# modeling/ is published file by file, so its own uses stay in it
GENERATION = "transformers.generation.utils.GenerationMixin"
MODELING = (
    f"{GENERATION}._check_early_stop_heuristic",
    f"{GENERATION}._beam_search_has_unfinished_sequences",
    f"{GENERATION}._extract_generation_mode_kwargs",
    f"{GENERATION}._get_running_beams_for_next_iteration",
    f"{GENERATION}._get_top_k_continuations",
    f"{GENERATION}._prefill",
    f"{GENERATION}._sample",
    f"{GENERATION}._update_finished_beams",
    f"{GENERATION}._update_model_kwargs_for_generation",
    f"{GENERATION}._eos_token_tensor",
    f"{GENERATION}._pad_token_tensor",
    f"{GENERATION}._is_user_defined",  # which it sets on a cache
    "transformers.PreTrainedModel._init_weights",
    "transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES",
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "torch._C._are_functorch_transforms_active",
    "torch._C._len_torch_dispatch_stack",
    "torch.autograd.forward_ad._current_level",
    "torch._dynamo",
    "torch._higher_order_ops",
    "torch._higher_order_ops.scan",
    "torch.nn.Module._apply",
    "torch.nn.modules.module._global_forward_hooks",
    "torch.nn.modules.module._global_forward_pre_hooks",
    "torch.nn.Module._parameters",
    "torch.nn.Module._modules",
    "torch.nn.Module._forward_hooks",
    "torch.nn.Module._forward_pre_hooks",
    "torch.utils.hooks.RemovableHandle.next_id",
    "torch.Tensor._version",
    "torch.compiler.assume_constant_result",  # sets _dynamo_marked_constant
    "torch._dynamo.decorators._dynamo_marked_constant",
)


def found(name: str) -> bool:
    """Whether a dotted name leads somewhere: by import and getattr, or, for its last part, by an assignment to it."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        try:
            place = importlib.import_module(".".join(words[:length]))
            break
        except ImportError:
            continue
    else:
        return False
    for position, word in enumerate(words[length:], length):
        if not hasattr(place, word):
            return position == len(words) - 1 and word in assigned_in(place)
        place = getattr(place, word)
    return True


def assigned_in(place) -> set[str]:
    """Attributes that the code of a class, of those it inherits from, or of a module sets on some object."""
    modules = {inspect.getmodule(cls) for cls in place.__mro__} if inspect.isclass(place) else {place}
    names = set()
    for module in modules:
        try:
            source = inspect.getsource(module)
        except (OSError, TypeError):  # built in
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.AnnAssign | ast.arg) and isinstance(getattr(node, "target", None), ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
                names |= {word.value for word in node.args[1:2] if isinstance(word, ast.Constant)}
    return names


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_the_package_reaches_into_is_there(name):
    if name == "deepspeed.git_version_info_installed.installed_ops":
        from ssm_lm.internals.deepspeed import built_operators

        file = Path(importlib.util.find_spec("deepspeed").origin).with_name("git_version_info_installed.py")
        assert "installed_ops" in file.read_text(), name
        assert isinstance(built_operators(), list)
        return
    assert found(name), f"{name} is gone: {PARTS[name].use}, because {PARTS[name].why}"


@pytest.mark.parametrize("name", MODELING)
def test_a_part_that_the_model_reaches_into_is_there(name):
    assert found(name), f"{name} is gone"


def test_the_list_of_the_model_is_whole():
    files = sorted((PACKAGE / "modeling").glob("*.py"))
    ours = {name for path in files for name in defined(path)}
    used = {name for path in files for name in private_uses(path)} - ours
    assert used <= {name.rpartition(".")[2] for name in MODELING}


@pytest.mark.parametrize("name", ["torch.cuda._nothing", "transformers.Trainer._nothing", "nothing.at_all"])
def test_a_part_that_is_gone_is_noticed(name):
    assert not found(name)


@pytest.mark.parametrize("file", FILES)
def test_the_list_of_a_file_is_whole(file):
    """Every private name that the code uses is in a list of parts."""
    listed = {name.rpartition(".")[2] for name in PARTS} | {"_module"}
    assert private_uses(PACKAGE / "internals" / f"{file}.py") <= listed
    parts = importlib.import_module(f"ssm_lm.internals.{file}").PARTS
    assert parts
    assert all(isinstance(part, internals.Part) and all(part) for part in parts)
