"""Pickled files, torch's and jittor's, are read as data: whatever is not a tensor is refused, never run."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from backbone.files.lazy import in_memory
from backbone.files.pickle_file import open_pickle_file
from backbone.files.torch_file import open_torch_file
from backbone.formats.containers import write_pickle
from backbone.weights import open_file, read_tensors, tensor_shapes


def read_torch_file(path):
    """(name, array) of every tensor, read one after the other."""
    for name, tensor in open_torch_file(path).items():
        yield name, tensor.read()


def test_views_of_a_torch_storage_are_read_as_they_are(tmp_path, assert_same):
    base = torch.arange(24.0).reshape(4, 6)
    state = {"transposed": base.t(), "slice": base[1:3, ::2], "column": base[:, 5], "whole": base, "tied": base}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(read_torch_file(tmp_path / "pytorch_model.bin"), state)


class Hostile:
    """Unpickled the ordinary way, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mknod, (self.path,))


def write_archive(path, pickled, records=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in records:
            archive.writestr(name, data)


def test_a_hostile_pickle_is_refused_by_name_and_not_run(tmp_path):
    planted = tmp_path / "planted"
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2), "b": Hostile(planted)}, file)
    for read in (lambda: list(read_tensors(tmp_path)), lambda: tensor_shapes(tmp_path)):
        with pytest.raises(ValueError, match=r"pytorch_model\.bin .*posix\.mknod"):
            read()
    assert not planted.exists()
    # The control: the same file does its harm to a reader that trusts it.
    torch.load(file, weights_only=False)
    assert planted.exists()


@pytest.mark.parametrize("suffix", ["pkl", "jtr", "pt", "bin"])
def test_a_hostile_plain_pickle_is_refused_by_name_and_not_run(tmp_path, suffix):
    planted, file = tmp_path / "planted", tmp_path / f"head.{suffix}"
    file.write_bytes(pickle.dumps({"a": np.ones(2), "b": Hostile(planted)}))
    with pytest.raises(ValueError, match=rf"head\.{suffix} .*posix\.mknod"):
        open_file(file)
    assert not planted.exists()
    pickle.loads(file.read_bytes())
    assert planted.exists()


class Plain:
    """An instance of a class from outside."""


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"a": np.array([1, "x"], dtype=object)}, "of type 'O8'"),
        ({"a": np.array(["x"])}, "of type 'U1'"),
        ({"a": np.zeros(2, ">f4")}, "big-endian"),
        ({"a": np.zeros(2, [("x", "f4")])}, "of type 'V4'"),
        ({"a": {"b": np.zeros(2)}}, "arrays inside other containers"),
        ([np.zeros(2)], "holds a list, expected a dict of arrays"),
        ({3: np.zeros(2)}, "an entry 3, expected names"),
        ({"a": np.float32(1)}, r"numpy\.core\.multiarray\.scalar"),
        ({"a": {1, 2}}, "uses EMPTY_SET"),
        ({"a": Plain()}, r"Plain, which is not part of a tensor"),
        ({"a": complex(1, 2)}, r"builtins\.complex"),
    ],
)
def test_pickles_of_other_things_than_arrays_of_numbers_are_refused(tmp_path, content, match):
    file = tmp_path / "x.pkl"
    file.write_bytes(pickle.dumps(content, 4))
    with pytest.raises(ValueError, match=rf"x\.pkl is not loaded: .*{match}"):
        open_pickle_file(file)


def test_truncated_and_changed_pickles_are_refused_by_name(tmp_path):
    file, array = tmp_path / "x.pkl", np.arange(50_000, dtype=np.float32)
    write_pickle(file, {"a": in_memory(array), "b": in_memory(array[:4])}, {"config": {}})
    whole = file.read_bytes()
    for length in (0, 1, 60, 10_000, len(whole) - 200):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.pkl"):
            open_pickle_file(file)
    changed = bytearray(whole)
    changed[100_000] ^= 1
    file.write_bytes(changed)
    with pytest.raises(ValueError, match=r"x\.pkl .*its checksum does not match"):
        open_pickle_file(file)[0]["a"].read()


def test_a_state_of_the_wrong_size_or_kind_is_refused(tmp_path):
    file, header = tmp_path / "x.pkl", b"\x80\x02}X\x01\x00\x00\x00a"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    array = array.replace(b"U\x01b", b"X\x01\x00\x00\x00b")
    dtype = b"cnumpy\ndtype\nX\x02\x00\x00\x00f4K\x00K\x01\x87R"

    def state(shape, data):
        return b"(K\x01" + shape + dtype + b"\x89" + data + b"tb"

    for end, match in [
        (state(b"K\x02\x85", b"C\x04abcd"), r"shape \(2,\) and type float32 in 4 bytes"),
        (state(b"J\xff\xff\xff\xff\x85", b"C\x04abcd"), r"shape \(-1,\)"),
        (state(b"K\x01\x85", b"]"), "not a block of numbers"),
        (b"", "an array without numbers"),
    ]:
        file.write_bytes(header + array + end + b"s.")
        with pytest.raises(ValueError, match=match):
            open_pickle_file(file)
    file.write_bytes(header + array + state(b"K\x01\x85", b"C\x04\x00\x00\x80\x3f") + b"s.")
    assert open_pickle_file(file)[0]["a"].read().tolist() == [1.0]


def test_a_state_dict_that_holds_a_tensor_twice_is_refused(tmp_path):
    file = tmp_path / "x.bin"
    pickled = pickle_of_view(0, (2,), (1,))
    entry = pickled[pickled.index(b"X\x01\x00\x00\x00w") : -2]
    write_archive(file, b"\x80\x02}" + entry + b"s" + entry + b"s.", [("archive/data/0", b"\0" * 16)])
    with pytest.raises(ValueError, match="it holds 'w' twice"):
        list(read_torch_file(file))
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_archive(file, pickled, [("archive/data/0", b"\0" * 16), ("archive/data/0", b"\1" * 16)])
    with pytest.raises(ValueError, match="holds record archive/data/0 twice"):
        list(read_torch_file(file))


@pytest.mark.parametrize(
    ("module", "name"),
    [("builtins", "eval"), ("torch", "load"), ("torch._utils", "_rebuild_parameter"), ("collections", "Counter")],
)
def test_every_other_global_is_refused_by_name(tmp_path, module, name):
    file = tmp_path / "x.bin"
    write_archive(file, f"c{module}\n{name}\n.".encode())
    with pytest.raises(ValueError, match=f"{module}.{name}"):
        list(read_torch_file(file))


class Storage:
    """Pickled as a reference to record 0 with four float32 numbers."""


def pickle_of_view(offset, shape, stride, reference=("storage", "FloatStorage", "0", "cpu", 4)):
    class Writer(pickle.Pickler):
        def persistent_id(self, value):
            return reference if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    Writer(buffer, protocol=2).dump((Storage(), offset, shape, stride, False, None))
    arguments = buffer.getvalue()[2:-1]  # without the protocol header and the final stop
    # {"w": torch._utils._rebuild_tensor_v2(*arguments)}
    return b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def test_a_hand_written_view_is_read_and_views_outside_their_storage_are_refused(tmp_path):
    file = tmp_path / "x.bin"
    data = [("archive/data/0", np.arange(4, dtype=np.float32).tobytes())]
    write_archive(file, pickle_of_view(1, (2,), (2,)), data)
    ((name, tensor),) = read_torch_file(file)
    assert name == "w" and tensor.tolist() == [1.0, 3.0]
    for offset, shape, stride in [
        (0, (5,), (1,)),
        (3, (2,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (10**9, 10**9), (0, 0)),
        (0, (2, 2), (1,)),
        (0, (2.0,), (1,)),
        (0, ("a",), (1,)),
    ]:
        write_archive(file, pickle_of_view(offset, shape, stride), data)
        with pytest.raises(ValueError, match=r"x\.bin"):
            list(read_torch_file(file))


def test_bad_storages_are_refused(tmp_path):
    file = tmp_path / "x.bin"
    short = [("archive/data/0", b"\0" * 12)]
    view = (0, (4,), (1,))
    write_archive(file, pickle_of_view(*view), short)
    with pytest.raises(ValueError, match="12 bytes, expected 4 x 4"):
        list(read_torch_file(file))
    write_archive(file, pickle_of_view(*view))
    with pytest.raises(ValueError, match="archive/data/0"):
        list(read_torch_file(file))
    write_archive(file, pickle_of_view(*view, reference=("storage", "QInt8Storage", "0", "cpu", 4)), short)
    with pytest.raises(ValueError, match="QInt8Storage"):
        list(read_torch_file(file))
    write_archive(file, pickle_of_view(*view), [("archive/data/0", b"\0" * 10**6)], zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        list(read_torch_file(file))


def test_checkpoints_with_more_than_tensors_and_an_older_format_are_refused(tmp_path):
    file, tensor = tmp_path / "x.bin", torch.ones(2)
    for content, settings, match in [
        ({"model": {"a": tensor}, "step": 3}, {}, "entry 'model' is a dict"),
        ([tensor], {}, "holds a list"),
        ({"a": tensor}, {"_use_new_zipfile_serialization": False}, "cannot be read as weights: File is not a zip file"),
    ]:
        torch.save(content, file, **settings)
        with pytest.raises(ValueError, match=match):
            list(read_torch_file(file))


def test_a_flipped_bit_in_a_torch_file_is_noticed(tmp_path):
    torch.save({"a": torch.full((64,), 3.0)}, tmp_path / "x.bin")
    data = bytearray((tmp_path / "x.bin").read_bytes())
    data[data.find(np.float32(3.0).tobytes() * 8)] ^= 1
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(ValueError, match="CRC"):
        list(read_torch_file(tmp_path / "x.bin"))
