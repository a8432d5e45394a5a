"""What 1, 2 and 4 ranks read and write under ZeRO, against the formulas of docs/scaling.md. `pytest -s` prints the
rows of its table of measured ones.
"""

import json
import re

import forked
import pytest
from harness import REPO, rewind, zero

from ssm_lm.cli import main

WORKER = str(REPO / "tests" / "training" / "traffic_worker.py")
MODEL = {"hidden_size": 256, "num_hidden_layers": 6, "state_size": 32, "ssm": "s4d", "arch": ["gated", "swiglu"]}


@pytest.fixture(scope="module")
def cut(corpus, tmp_path_factory):
    """The corpus of the tests of training in 47 token files."""
    folder = tmp_path_factory.mktemp("cut")
    command = ["prepare", "--dataset", str(corpus.parent / "text"), "--tokenizer", "words", "--shard-tokens", "128"]
    assert main([*command, "--output", str(folder / "data")]) == 0
    return folder / "data"


def watched(config: str, place, ranks: int) -> list[dict]:
    """What each rank says, in order."""
    done = forked.run([WORKER, "train", config, "--output_dir", str(place)], ranks=ranks)
    said = [json.loads(found) for found in re.findall(r'{"start".*?}', done.stdout)]  # ranks may share a line
    assert len(said) == ranks
    return sorted(said, key=lambda found: found["rank"])


@pytest.mark.long
@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), (2, 2), (2, 4), (3, 2), (3, 4)])
def test_what_ranks_read_and_write(write_config, cut, tmp_path, stage, ranks):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    config = write_config(data=str(cut), model=MODEL, deepspeed=zero(stage), per_device_train_batch_size=1, **settings)
    first, *others = begun = watched(config, tmp_path / "run", ranks)
    files = [path for path in (tmp_path / "run" / "checkpoint-1").rglob("*") if path.is_file()]
    written, P = sum(path.stat().st_size for path in files), parameters(tmp_path / "run")
    rewind(tmp_path / "run", tmp_path / "again", 1)
    on = watched(config, tmp_path / "again", ranks)
    assert [found["step"] for found in on] == [1] * ranks
    more = max(b["read"] - a["read"] for a, b in zip(begun, on, strict=True))
    whole, to_read = (20 * P, 8 * P + 12 * P / ranks) if stage == 2 else (16 * P, 12 * P / ranks)
    print(
        f"| {stage} | {ranks} | {first['start']:,} | {first['sizes']}; {max([0, *(f['sizes'] for f in others)])} |",
        end="",
    )
    print(f" {written / 1e6:.1f} ({whole / 1e6:.1f}) | {len(files)} | {more / 1e6:.1f} ({to_read / 1e6:.1f}) |")
    assert len({found["start"] for found in begun}) == 1
    assert first["sizes"] >= 47
    assert all(found["sizes"] <= 8 for found in others)  # of what the first windows lie in
    assert written == pytest.approx(whole + ranks * 15e3 + 0.7e6, rel=0.03)
    assert more == pytest.approx(to_read, rel=0.03)


def parameters(run) -> int:
    from safetensors import safe_open

    with safe_open(run / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys())
