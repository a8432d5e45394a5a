"""The kernels' files in a repository of the Hub: all are copied, and none makes Triton a requirement."""

from pathlib import Path

from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import ssm_lm.modeling


def test_kernels_are_copied_and_triton_is_no_requirement():
    folder = Path(ssm_lm.modeling.__file__).parent
    files = {Path(file) for file in get_relative_import_files(folder / "modeling_s4.py")}
    assert {file.name for file in folder.glob("triton_*.py")} <= {file.name for file in files}
    assert [file.name for file in files if "triton" in get_imports(file)] == []
