"""Tensors are read by rows as they are read whole, and our files are those of safetensors, torch and jittor."""

import json
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from backbone.files import lazy
from backbone.files.lazy import in_memory, join_columns, join_rows, map_rows, stored
from backbone.files.meta import to_half_split, to_interleaved
from backbone.files.pickle_file import open_pickle_file
from backbone.formats.containers import write_pickle, write_safetensors, write_torch
from backbone.formats.shards import parse_size, plan_shards
from backbone.weights import open_file
from runtime import jt
from tests.backbone.models import bits

# Lazy tensors --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_of_a_lazy_tensor_are_those_of_the_whole(data):
    rows, columns, group = data.draw(st.integers(1, 6)) * 4, data.draw(st.integers(1, 4)) * 2, 4
    array = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"odd" + array.tobytes())
        file.flush()
        whole = stored(Path(file.name), array.dtype, array.shape, 3)
        turned = stored(Path(file.name), array.dtype, (columns, rows), 3, (1, columns))
        cut = rows // 2
        halves = [in_memory(array[:cut]), in_memory(array[cut:])]
        sides = [in_memory(array[:, : columns // 2]), in_memory(array[:, columns // 2 :])]
        cases = [
            (whole, array),
            (turned, array.T),
            (join_rows(halves), array),
            (join_columns(sides), array),
            (map_rows(whole, group, lambda r: r.reshape(-1, group, columns)[:, ::-1].reshape(r.shape)),
             array.reshape(-1, group, columns)[:, ::-1].reshape(array.shape)),
            (to_half_split(to_interleaved(whole, group), group), array),
        ]  # fmt: skip
        for tensor, expected in cases:
            start = data.draw(st.integers(0, tensor.num_rows - 1))
            stop = data.draw(st.integers(start + 1, tensor.num_rows))
            found = tensor.read_rows(start, stop)
            assert found.flags.c_contiguous and found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected[start:stop])
            np.testing.assert_array_equal(tensor.read(), expected)


def test_shards_that_do_not_fit_together_are_refused():
    parts = [in_memory(np.zeros((2, 3), np.float16)), in_memory(np.zeros((2, 4), np.float16))]
    with pytest.raises(ValueError, match="do not fit together"):
        join_rows(parts)
    with pytest.raises(ValueError, match="do not fit together"):
        join_columns([parts[0], in_memory(np.zeros((2, 3), np.float32))])


# Containers ----------------------------------------------------------------------------------------------------------


ARRAYS = {
    "half": np.arange(12, dtype=np.float16).reshape(3, 4),
    "brain": np.linspace(-3, 3, 5).astype(ml_dtypes.bfloat16),
    "single": np.float32([[np.inf, np.nan], [-0.0, 1e-45]]),
    "double": np.float64(2.5),
    "long": np.int64([2**62 + 1, -1]),
    "truth": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float32),
    "large": np.arange(100_000, dtype=np.float32).reshape(500, 200),
}


def lazies(without=()):
    return {name: in_memory(np.asarray(array)) for name, array in ARRAYS.items() if name not in without}


def assert_arrays(found, without=()):
    expected = bits(lazies(without))
    assert {name: expected[name] for name in found} == bits(found) and found.keys() == expected.keys()


def test_safetensors_of_ours_are_read_by_the_library_and_by_us(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", lazies())
    assert_arrays(open_file(tmp_path / "x.safetensors"))
    theirs = load_file(tmp_path / "x.safetensors")
    assert theirs["long"].tolist() == [2**62 + 1, -1] and theirs["brain"].dtype == torch.bfloat16
    assert torch.equal(theirs["large"], torch.from_numpy(ARRAYS["large"]))


@pytest.mark.parametrize("mmap", [False, True])
def test_zips_of_ours_are_read_by_torch_without_trust_and_by_us(tmp_path, mmap):
    write_torch(tmp_path / "x.pth", lazies() | {"tied": lazies()["large"]}, {"tied": "large"})
    theirs = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mmap)
    assert theirs["tied"].data_ptr() == theirs["large"].data_ptr() and theirs["large"].data_ptr() % 64 == 0
    assert theirs["long"].tolist() == [2**62 + 1, -1] and theirs["brain"].dtype == torch.bfloat16
    del theirs["tied"]
    for name, tensor in theirs.items():
        ours = np.asarray(ARRAYS[name])
        assert tuple(tensor.shape) == ours.shape
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == ours.tobytes(), name
    found = open_file(tmp_path / "x.pth")
    assert found.pop("tied").read().tobytes() == ARRAYS["large"].tobytes()
    assert_arrays(found)
    # The second name costs no second copy.
    assert (tmp_path / "x.pth").stat().st_size < 1.1 * ARRAYS["large"].nbytes


def test_pickles_of_ours_are_read_by_jittor_and_jittors_by_us(tmp_path):
    ours, theirs = tmp_path / "ours.pkl", tmp_path / "theirs.pkl"
    write_pickle(ours, lazies({"brain"}), {"config": {"a": [1, None, "x"]}})
    loaded = jt.load(str(ours))
    assert loaded.pop("config") == {"a": [1, None, "x"]}
    assert bits({name: in_memory(array) for name, array in loaded.items()}) == bits(lazies({"brain"}))
    jt.save({**loaded, "turned": np.asfortranarray(ARRAYS["large"]), "config": {"a": 1}}, str(theirs))
    tensors, rest = open_pickle_file(theirs)
    assert tensors.pop("turned").read().tobytes() == ARRAYS["large"].tobytes()
    assert_arrays(tensors, {"brain"})
    assert rest == {"config": {"a": 1}}
    jt.save({"var": jt.array(ARRAYS["large"])}, str(theirs))  # a Var is pickled by its array
    assert open_pickle_file(theirs)[0]["var"].read().tobytes() == ARRAYS["large"].tobytes()


def test_what_is_written_does_not_depend_on_when_and_how(tmp_path, monkeypatch):
    for number, at_once in enumerate((1 << 24, 64)):
        monkeypatch.setattr(lazy, "BLOCK_BYTES", at_once)
        write_safetensors(tmp_path / f"{number}.safetensors", lazies())
        write_torch(tmp_path / f"{number}.pth", lazies())
        write_pickle(tmp_path / f"{number}.pkl", lazies({"brain"}), {})
    for suffix in ("safetensors", "pth", "pkl"):
        assert (tmp_path / f"0.{suffix}").read_bytes() == (tmp_path / f"1.{suffix}").read_bytes()


def test_types_that_a_container_cannot_hold_are_refused_by_name(tmp_path):
    strange = {"w": in_memory(np.zeros(2, np.complex64))}
    for write in (write_safetensors, write_torch, lambda path, tensors: write_pickle(path, tensors, {})):
        with pytest.raises(ValueError, match="w is complex64"):
            write(tmp_path / "x", strange)
    with pytest.raises(ValueError, match="no bfloat16; choose --dtype float32"):
        write_pickle(tmp_path / "x", {"w": in_memory(ARRAYS["brain"])}, {})


def test_a_safetensors_file_whose_length_begins_like_a_pickle_is_read(tmp_path):
    header = json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode()
    length = 0x0280  # its first bytes, 80 02, are those of a pickle
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + header.ljust(length) + b"\x05\x06")
    assert open_file(tmp_path / "x")["a"].read().tolist() == [5, 6]


def test_sizes_and_shards_by_hand():
    assert [parse_size(text) for text in ("2GB", "1.5KiB", "7", "3 mb")] == [2 * 10**9, 1536, 7, 3 * 10**6]
    for text in ("", "GB", "-1GB", "2XB", "0", "1e3"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(text)
    tensors = {name: in_memory(np.zeros(size, np.uint8)) for name, size in {"a": 2, "b": 2, "c": 5, "d": 1}.items()}
    assert plan_shards(tensors, "m.bin", 4) == {
        "m-00001-of-00003.bin": ["a", "b"],
        "m-00002-of-00003.bin": ["c"],
        "m-00003-of-00003.bin": ["d"],
    }
    assert plan_shards(tensors, "m.bin", 10) == {"m.bin": list("abcd")}
