"""Run transformers' own common model tests against the S4 classes.

    python tests/conformance/run.py --transformers PATH [--transformers PATH ...] [--config JSON] [pytest's arguments]

PATH: a checkout of transformers of the installed release, or anything that holds parts of its tests/; a later one is
laid over the earlier ones, since the source distribution on PyPI holds only tests/test_*.py. Nothing is written there:
the tests run in a temporary copy, with the adapter beside this file as tests/models/s4/test_modeling_s4.py. They need
pytest, parameterized, timeout-decorator, datasets, peft, httpx, GitPython and sentencepiece, and no network.
Prints the skipped tests, grouped by reason, and ends with pytest's exit code.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent

# what the common tests import, as globs under a checkout
PARTS = [
    "conftest.py",
    "pyproject.toml",
    "tests/*.py",
    "tests/generation/*.py",
    "tests/exporters/*.py",
    "tests/pipelines/*.py",
    "tests/utils/*.py",
    "utils/**/*.py",
]

# a helper of the tests on several ranks that no published part of 5.23 holds
NO_RANKS = """
import unittest


def _skip(*args, **kwargs):
    raise unittest.SkipTest("no tests/distributed_testing_utils.py: nothing starts the ranks")


run_distributed = _get_distributed_backend = _get_rank_device = _set_rank_device = _start_rank_processes = _skip


def _get_distributed_device_type():
    return "cpu"
"""


def assemble(sources: list[Path], root: Path) -> Path:
    """A tree of tests in `root`, from all sources, with the adapter in it. Returns the adapter's place."""
    for source in sources:
        found = [path for pattern in PARTS for path in source.glob(pattern)]
        if not any(path.parent.name == "tests" for path in found):
            raise SystemExit(f"{source}: no tests/*.py in it: --transformers wants a checkout or an unpacked sdist")
        for path in found:
            target = root / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    missing = [
        name for name in ("causal_lm_tester.py", "generation/test_utils.py") if not (root / "tests" / name).exists()
    ]
    if missing:
        raise SystemExit(f"no tests/{missing[0]}: give the path of a checkout that has it too")
    export = root / "tests/exporters/test_export.py"
    if export.exists():  # what an exporter of 5.23 returns has the program inside
        export.write_text(export.read_text().replace("exported_program.module()", "exported_program.program.module()"))
    ranks = root / "tests/distributed_testing_utils.py"
    if not ranks.exists():
        ranks.write_text(NO_RANKS)
    import transformers

    (root / "src").mkdir()
    (root / "src/transformers").symlink_to(Path(transformers.__file__).parent)
    place = root / "tests/models/s4"
    place.mkdir(parents=True)
    for package in (root / "tests", root / "tests/models", place):
        (package / "__init__.py").touch()
    return Path(shutil.copyfile(HERE / "adapter_s4.py", place / "test_modeling_s4.py"))


def tiny_models(folder: Path, overrides: dict) -> None:
    """The pipelines' tests load a tiny model of each class, with its tokenizer, from a list of such models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from ssm_lm import S4Config, S4ForCausalLM, S4ForSequenceClassification, S4Model

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 16, "intermediate_size": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = S4Config(**({"vocab_size": len(vocabulary)} | sizes | tokens | overrides))
    summary = {}
    for cls in (S4Model, S4ForCausalLM, S4ForSequenceClassification):
        cls(config).save_pretrained(folder / "s4" / cls.__name__)
        tokenizer.save_pretrained(folder / "s4" / cls.__name__)
        summary[cls.__name__] = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
    (folder / "reports").mkdir()
    (folder / "reports/tiny_model_summary.json").write_text(json.dumps(summary))


def skips(report: Path) -> dict[str, list[str]]:
    """Reason -> names of the tests, from a JUnit report."""
    found = defaultdict(list)
    for case in ET.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if skipped is not None:
            reason = skipped.get("message") or "no reason given"
            if "`self.pipeline_model_mapping`" in reason:
                reason = "a pipeline of another kind of model"
            found[reason].append(case.get("name"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--transformers", type=Path, action="append", required=True, metavar="PATH")
    parser.add_argument("--config", type=json.loads, default={}, metavar="JSON", help="keys of S4Config")
    options, pytest_arguments = parser.parse_known_args()
    sys.path.insert(0, str(REPOSITORY))
    with tempfile.TemporaryDirectory(prefix="s4-conformance-") as folder:
        root = Path(folder, "tree")
        root.mkdir()
        adapter = assemble([path.resolve() for path in options.transformers], root)
        tiny_models(Path(folder, "tiny"), options.config)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(root), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_TINY_MODEL_PATH": str(Path(folder, "tiny")),
            "S4_CONFORMANCE": json.dumps(options.config),
        }
        report = Path(folder, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "log_cli=false",
            f"--junitxml={report}",
        ]
        code = subprocess.run([*command, str(adapter), *pytest_arguments], cwd=root, env=environment).returncode
        if report.exists():
            print("\nskipped:")
            for reason, names in sorted(skips(report).items(), key=lambda item: -len(item[1])):
                print(
                    f"{len(names):4d}  {reason}\n      {', '.join(sorted(names)[:8])}{' ...' if len(names) > 8 else ''}"
                )
    return code


if __name__ == "__main__":
    sys.exit(main())
