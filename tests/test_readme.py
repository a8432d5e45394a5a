"""The commands of the README and of the reference run. Those that need what a test machine lacks are parsed instead."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ssm_lm.cli import build_parser

REPO = Path(__file__).parents[1]
sys.path.append(str(REPO / "tests" / "training"))  # forked.py
VENV = Path(sys.prefix)
# in the order in which they are read: each goes on from those before
PAGES = ("README.md", "docs/reference.md", "docs/finetuning.md")
BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>[^>]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)

# the README's commands at full size -> the same at the size of a test
SMALLER = {
    "make quickstart": f"make -o {VENV}/.installed VENV={VENV} quickstart "
    'QUICKSTART="--max_steps 4 --eval_steps 2 --save_steps 2"',
    "--max_steps 200": "--max_steps 2 --eval_strategy no --per_device_train_batch_size 2",
    "make test": "true",  # is what runs this
    "train configs/train/digits.yaml": "train configs/train/digits.yaml --max_steps 3 --eval_strategy no",
    "train configs/train/finetune.yaml": "train configs/train/finetune.yaml --sequence_length 64 --num_train_epochs 2 "
    "--per_device_train_batch_size 4 --learning_rate 4e-3",  # of a model that has hardly been trained
}


def written_pages() -> list[Path]:
    names = subprocess.run(["git", "ls-files", "*.md"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    return [REPO / name for name in names.split()]


def blocks() -> list[dict]:
    return [match.groupdict() for page in PAGES for match in BLOCK.finditer((REPO / page).read_text())]


def test_every_block_is_of_a_known_kind():
    found = blocks()
    assert len(found) >= 10
    assert {block["language"] for block in found} == {"bash", "python", "text", "yaml"}
    assert sum((REPO / page).read_text().count("```") for page in PAGES) == 2 * len(found)


def test_the_readme_is_short():
    assert len((REPO / "README.md").read_text().splitlines()) <= 150


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(str(path.relative_to(REPO)) for path in written_pages()))
def test_links_lead_somewhere(page):
    """Files and headings; addresses on the network are not asked."""
    for target in re.findall(r"\]\(([^)\s]+)\)", (REPO / page).read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        place = ((REPO / page).parent / name).resolve() if name else REPO / page
        assert place.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(place), f"{page}: {target}"


# where a page may look for a file that it names
ROOTS = (".", "ssm_lm", "ssm_lm/modeling", "ssm_lm/training", "tests/modeling", "docs")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_that_the_maps_name_are_there(page):
    text = (REPO / page).read_text()
    names = set(re.findall(r"`([\w./-]+(?:/|\.(?:py|md|json|svg|yaml)))`", text))
    assert len(names) >= 10
    missing = [name for name in names if "NAME" not in name and not any((REPO / r / name).exists() for r in ROOTS)]
    assert not missing


def test_the_layers_of_modeling_are_those_of_the_map():
    """Every file stands in the table of docs/architecture.md, and imports only from its own row and those above."""
    folder = REPO / "ssm_lm" / "modeling"
    table = (REPO / "docs" / "architecture.md").read_text().split("## The layers of modeling/")[1].split("\n## ")[0]
    rows = [re.findall(r"`([\w*]+)`", line.split("|")[2]) for line in table.splitlines() if line.startswith("| ")]
    names = {file.stem for file in folder.glob("*.py")} - {"__init__"}
    height = {}
    for number, row in enumerate(rows):
        for pattern in row:
            found = [name for name in fnmatch.filter(names, pattern) if name not in height]
            assert found, pattern
            height |= dict.fromkeys(found, number)
    assert names == set(height)
    for name in names:
        for imported in re.findall(r"^ *from \.(\w+) import", (folder / f"{name}.py").read_text(), re.MULTILINE):
            assert height[imported] <= height[name], f"{name} imports {imported}"


def test_commands_for_elsewhere_are_well_formed():
    """Verbs, flags and files of the blocks that are not run."""
    checked = 0
    for block in blocks():
        if block["language"] != "bash" or not block["needs"]:
            continue
        for line in block["code"].replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if words[0] == "ssm-lm":
                words = words[1:]
            elif words[0].startswith("launch/"):  # its options come before the config, and tests/launch/ checks them
                assert (REPO / words[0]).is_file(), line
                words = ["train", *words[next(i for i, word in enumerate(words) if word.endswith(".yaml")) :]]
            else:
                assert words[0] in ("torchrun", "deepspeed"), line
                words = words[words.index("ssm_lm") + 1 :]
            args = build_parser(words[0]).parse_args(words)
            if words[0] == "train":
                assert (REPO / args.config).is_file(), line
            checked += 1
    assert checked >= 4


@pytest.fixture
def checkout(tmp_path):
    """A copy of the checkout, in which `make quickstart` takes the pages themselves for its corpus."""
    files = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, target)
    makefile = (REPO / "Makefile").read_text()
    assert "--dataset builtin" in makefile  # tests/data/ has the tests of that corpus
    (tmp_path / "Makefile").write_text(makefile.replace("--dataset builtin", "--dataset small"))
    (tmp_path / "small").mkdir()
    for split, pages in (("train", written_pages()), ("valid", [REPO / "README.md"]), ("test", [REPO / PAGES[1]])):
        (tmp_path / "small" / f"{split}.txt").write_text("".join(page.read_text() for page in pages))
    return tmp_path


@pytest.mark.slow
@pytest.mark.seconds(130)
@pytest.mark.timeout(1200)  # several minutes of commands, on a machine with nothing beside it
def test_the_other_blocks_run_in_order(checkout):
    """As a newcomer would go through the pages. What `make` starts are processes of their own; a verb after it is a
    fork, which spares the imports."""
    import forked

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {
        "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(checkout / "modules"),
        "PYTHONPATH": str(REPO),
    }

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "profiler_start" not in done.stdout + done.stderr  # the ranks of the quickstart sample their collectives

    for block in blocks():
        code = block["code"]
        if block["needs"] or block["language"] in ("text", "yaml"):
            continue
        for full, small in SMALLER.items():
            code = code.replace(full, small)
        if block["language"] == "python":
            if "trust_remote_code" in code:  # the first to import torch, as with its user
                run(sys.executable, "-c", code)
            else:
                (checkout / "block.py").write_text(code)
                forked.run([str(checkout / "block.py")], folder=checkout)
            continue
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if words[0] == "ssm-lm":
                forked.run(["-m", "ssm_lm", *words[1:]], folder=checkout)
            else:
                run("bash", "-euc", line)
    assert (checkout / "exports" / "quickstart" / "modeling_s4.py").is_file()
    assert (checkout / "exports" / "quickstart" / "curves.png").is_file()  # of the card
    assert (checkout / "runs" / "quickstart" / "runs").is_dir()  # TensorBoard
    assert (checkout / "runs" / "quickstart" / "curves.png").is_file()
    results = (checkout / "runs" / "before.json", checkout / "runs" / "finetuned" / "eval.json")
    before, after = (json.loads(path.read_text())["token_perplexity"] for path in results)
    assert after < 0.9 * before
