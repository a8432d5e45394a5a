import gzip

import numpy as np
import pytest
import torch

from ssm_lm.data.sequences import load_task
from ssm_lm.errors import UserError


def test_digits():
    pytest.importorskip("sklearn")
    task = load_task("digits")
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 1257, "validation": 180, "test": 360}
    batch = task.collate([task.splits["train"][i] for i in range(5)])
    assert batch["inputs_embeds"].shape == (5, 64, 1)
    assert batch["inputs_embeds"].dtype == torch.float32
    assert batch["inputs_embeds"].max() <= 1
    assert set(batch["labels"].tolist()) <= set(range(10))
    assert "attention_mask" not in batch
    # no image is in two splits
    rows = [
        tuple(split[i]["inputs_embeds"].flatten().tolist()) for split in task.splits.values() for i in range(len(split))
    ]
    assert len(set(rows)) == len(rows) == 1797
    assert task.model_keys() == {"num_labels": 10, "input_size": 1}


def write_idx(path, array, compress):
    header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
    with (gzip.open if compress else open)(path, "wb") as file:
        file.write(header + array.tobytes())


@pytest.mark.parametrize("compress", [False, True])
def test_fashion_mnist(tmp_path, compress):
    rng = np.random.default_rng(0)
    suffix = ".gz" if compress else ""
    for name, count in (("train", 24), ("t10k", 6)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{suffix}", images, compress)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8) % 10, compress)
    task = load_task(f"fashion-mnist:{tmp_path}")
    assert [len(task.splits[name]) for name in ("train", "validation", "test")] == [22, 2, 6]
    example = task.splits["test"][1]
    assert example["labels"] == 1
    torch.testing.assert_close(
        example["inputs_embeds"][:, 0], torch.from_numpy(images[1].flatten().astype(np.float32) / 255)
    )


def test_imdb_bytes(tmp_path):
    for split in ("train", "test"):
        for label in ("pos", "neg"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(3):
                (tmp_path / split / label / f"{i}.txt").write_bytes(
                    b"ab\xff"[: i + 1] if label == "pos" else b"z" * 5000
                )
    task = load_task(f"imdb:{tmp_path}")
    assert [len(task.splits[name]) for name in ("train", "validation", "test")] == [4, 2, 6]
    test = task.splits["test"]
    assert test[5]["input_ids"].tolist() == [98, 99, 256]
    assert len(test[0]["input_ids"]) == 4096
    batch = task.collate([test[3], test[5]])
    assert batch["input_ids"].tolist() == [[98, 0, 0], [98, 99, 256]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar", "there are digits"),
        ("imdb", "imdb:FOLDER"),
        ("imdb:nowhere", "no such folder"),
        ("fashion-mnist:{tmp}", "no such file"),
        ("imdb:{tmp}", "no .txt files"),
    ],
)
def test_what_is_not_there(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        load_task(name.format(tmp=tmp_path))


def test_a_truncated_idx_file(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0\0\x05")
    with pytest.raises(UserError, match="truncated"):
        load_task(f"fashion-mnist:{tmp_path}")
