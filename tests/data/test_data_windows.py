import hashlib
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_lm.data.manifest import FORMAT_VERSION, Manifest, SplitInfo
from ssm_lm.data.stream import TokenStream
from ssm_lm.data.windows import TABLE, TokenWindows, WindowSampler
from ssm_lm.errors import UserError


def write_stream(folder, tokens, vocab_size=1000, dtype="uint16"):
    """A prepared folder with one split, train, of the given ids."""
    folder.mkdir(exist_ok=True)
    data = np.array(tokens, dtype={"uint16": "<u2", "uint32": "<u4"}[dtype]).tobytes()
    (folder / "train.bin").write_bytes(data)
    info = SplitInfo(len(tokens), 1, 1, 1, 1, hashlib.sha256(data).hexdigest())
    values = {"dataset": "d", "description": "d", "tokenizer": "t", "tokenizer_sha256": "0", "eos_token_id": 0}
    Manifest(FORMAT_VERSION, **values, vocab_size=vocab_size, dtype=dtype, splits={"train": info}, request={}).write(
        folder
    )
    return TokenStream.open(folder, "train")


@pytest.fixture(scope="module")
def stream_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    return lambda count, **options: write_stream(folder, range(count), **options)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_windows_hold_the_tokens(stream_of, dtype):
    windows = TokenWindows(stream_of(100, dtype=dtype), 8)
    assert len(windows) == 93
    window = windows[92]
    assert window["input_ids"].tolist() == window["labels"].tolist() == list(range(92, 100))
    assert window["input_ids"].dtype == window["labels"].dtype == torch.int64
    window["labels"][0] = -100
    assert window["input_ids"][0] == 92
    for outside in (-1, 93):
        with pytest.raises(IndexError):
            windows[outside]


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(0, 150), st.integers(0, 2**40), st.integers(0, 1000))
def test_an_epoch_covers_the_stream_without_overlap(stream_of, length, extra, seed, epoch):
    count = length + extra
    windows = TokenWindows(stream_of(count), length)
    sampler = WindowSampler(windows, seed)
    sampler.set_epoch(epoch)
    starts = list(sampler)
    assert len(starts) == len(sampler) >= 1
    seen = np.concatenate([windows[start]["input_ids"].numpy() for start in starts])
    assert len(np.unique(seen)) == len(seen) == len(sampler) * length
    # what an epoch leaves out is less than a window at the front and a window at the end
    assert count - len(seen) <= 2 * (length - 1)
    assert min(starts) < length
    assert all(type(start) is int for start in starts)


def test_order_is_a_function_of_seed_and_epoch(stream_of):
    windows = TokenWindows(stream_of(1000), 10)
    one, two = WindowSampler(windows, 7), WindowSampler(windows, 7)
    for epoch in (0, 1):
        one.set_epoch(epoch)
        assert list(one) == list(one)
    torch.manual_seed(5)
    np.random.seed(5)
    two.set_epoch(1)
    assert list(two) == list(one)
    two.set_epoch(0)
    assert list(two) != list(one)
    assert list(WindowSampler(windows, 8)) != list(two)
    assert list(two) != sorted(two)


def test_order_stays_the_same_in_later_releases(stream_of):
    # a resumed run must see the data that it would have seen: this order is part of the format
    sampler = WindowSampler(TokenWindows(stream_of(60), 8), seed=3)
    assert [sampler.starts(epoch).tolist() for epoch in (0, 1)] == [[24, 0, 32, 40, 16, 8], [43, 11, 3, 19, 27, 35]]


def test_a_place_far_ahead_is_that_of_its_epoch(stream_of):
    sampler = WindowSampler(TokenWindows(stream_of(60), 8), seed=3)  # six windows an epoch
    assert sampler.at(np.array([5, 6, 0, 11])).tolist() == [8, 43, 24, 35]
    far = 6 * 10**12 + 2
    assert sampler.at(np.array([far]))[0] == sampler.starts(10**12)[2]


class Long:
    """A stream of so many tokens, of which there are none."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def test_a_long_stream_is_shuffled_without_a_table():
    """Ten billion windows: at once, in no memory; every window of an epoch once, the next epoch otherwise."""
    windows = TokenWindows(Long(10**13), 1000)
    sampler = WindowSampler(windows, seed=3)
    places = np.array([0, 1, len(sampler) - 1, len(sampler), 10**15])
    starts = sampler.at(places)
    expected = [1453083741280, 5535433801280, 9841030001280, 619305592299, 1178219892254]
    assert starts.tolist() == expected  # part of the format, as above
    assert len(set((starts[:3] % 1000).tolist())) == 1  # an epoch has one offset
    assert ((starts >= 0) & (starts < len(windows))).all()


def test_up_to_65536_windows_the_order_is_that_of_a_table():
    """So runs on small texts see what they saw before; and runs that began before see it on long ones."""
    for count, same in ((TABLE, True), (TABLE + 1, False)):
        windows = TokenWindows(Long(count * 4 + 3), 4)
        sampler = WindowSampler(windows, seed=5)
        assert len(sampler) == count
        order = sampler.starts(2)
        assert sorted(order // 4) == list(range(count))
        assert (order.tolist() == WindowSampler(windows, seed=5, tables=True).starts(2).tolist()) == same


def test_sources_of_one_size_go_different_ways(stream_of):
    windows = TokenWindows(stream_of(1000), 10)
    one, two = (WindowSampler(windows, 7, source=source).starts(0).tolist() for source in (0, 1))
    assert one != two


def test_every_offset_is_used(stream_of):
    sampler = WindowSampler(TokenWindows(stream_of(100), 4))
    assert {min(sampler.starts(epoch)) for epoch in range(60)} == {0, 1, 2, 3}
    assert {len(sampler.starts(epoch)) for epoch in range(60)} == {24}


def test_too_short_a_stream(stream_of):
    with pytest.raises(UserError, match=r"train split has 9 tokens, sequence_length is 10; give"):
        TokenWindows(stream_of(9), 10)
    assert list(WindowSampler(TokenWindows(stream_of(9), 9))) == [0]
    with pytest.raises(UserError, match="sequence_length 1"):
        TokenWindows(stream_of(9), 1)
    with pytest.raises(UserError, match="seed -1"):
        WindowSampler(TokenWindows(stream_of(9), 9), -1)


def test_stream_properties_and_pickle(stream_of):
    stream = stream_of(50)
    assert (len(stream), stream.vocab_size, stream.eos_token_id) == (50, 1000, 0)
    assert isinstance(stream.tokens, np.memmap)
    assert not stream.tokens.flags.writeable
    assert stream.fingerprint == hashlib.sha256((stream.folder / "train.bin").read_bytes()).hexdigest()
    data = pickle.dumps(stream)
    assert len(data) < 500
    assert pickle.loads(data).tokens.tolist() == list(range(50))


def test_verify_finds_a_changed_byte(tmp_path):
    stream = write_stream(tmp_path, range(50))
    stream.verify()
    data = bytearray((tmp_path / "train.bin").read_bytes())
    data[7] ^= 1
    (tmp_path / "train.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"train\.bin: sha256"):
        TokenStream.open(tmp_path, "train").verify()


def test_vocabulary_of_a_model(tmp_path):
    stream = write_stream(tmp_path, [3, 9, 1], vocab_size=10)
    stream.check_vocabulary(10)
    with pytest.raises(UserError, match="has 10 tokens, gpt only 9"):
        stream.check_vocabulary(9, "gpt")
    with pytest.raises(UserError, match="holds the token 10, gpt has only 10"):
        write_stream(tmp_path, [3, 10, 1], vocab_size=10).check_vocabulary(10, "gpt")


def test_open_refuses_what_is_not_whole(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        TokenStream.open(tmp_path / "none", "train")
    with pytest.raises(UserError, match=r"manifest\.json: no such file"):
        TokenStream.open(tmp_path, "train")
    write_stream(tmp_path, range(50))
    with pytest.raises(UserError, match="no split 'test'; there are train"):
        TokenStream.open(tmp_path, "test")
    (tmp_path / "train.bin").write_bytes(b"\0" * 99)
    with pytest.raises(UserError, match=r"train\.bin: 99 bytes, where the manifest's 50 tokens are 100"):
        TokenStream.open(tmp_path, "train")
    (tmp_path / "train.bin").unlink()
    with pytest.raises(UserError, match=r"train\.bin: no such file"):
        TokenStream.open(tmp_path, "train")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"vocab_size": 1000', '"vocab_size": "many"', "key vocab_size is missing or no int"),
        ('"tokens": 50,', "", "key splits.train.tokens is missing"),
        ('"uint16"', '"int8"', "dtype 'int8'"),
        ('"format_version": 2', '"format_version": 9', "format version 9"),
        ("{", "", "not readable"),
    ],
)
def test_bad_manifests(tmp_path, old, new, message):
    write_stream(tmp_path, range(50))
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=rf"manifest\.json: .*{message}"):
        TokenStream.open(tmp_path, "train")
