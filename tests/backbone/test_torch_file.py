"""Torch's own files are read as data: a view is honoured, and whatever is not a tensor is refused, never run."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from backbone.torch_file import read_torch_file
from backbone.weights import read_tensors, tensor_shapes


def test_views_of_a_torch_storage_are_honoured(tmp_path, assert_same):
    base = torch.arange(24.0).reshape(4, 6)
    state = {"transposed": base.t(), "slice": base[1:3, ::2], "column": base[:, 5], "whole": base, "tied": base}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(read_torch_file(tmp_path / "pytorch_model.bin"), state)


class Hostile:
    """Unpickled the ordinary way, it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


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
        with pytest.raises(ValueError, match=r"pytorch_model\.bin .*(posix|nt)\.mkdir"):
            read()
    assert not planted.exists()
    # The control: the same file does its harm to a reader that trusts it.
    torch.load(file, weights_only=False)
    assert planted.exists()


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


def test_checkpoints_with_more_than_tensors_are_refused(tmp_path):
    file = tmp_path / "x.bin"
    torch.save({"model": {"a": torch.ones(2)}, "step": 3}, file)
    with pytest.raises(ValueError, match="entry 'model' is a dict"):
        list(read_torch_file(file))
    torch.save([torch.ones(2)], file)
    with pytest.raises(ValueError, match="holds a list"):
        list(read_torch_file(file))


def test_the_format_before_the_zip_is_refused(tmp_path):
    file = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"x\.bin cannot be read as weights: File is not a zip file"):
        list(read_torch_file(file))


def test_a_flipped_bit_in_a_torch_file_is_noticed(tmp_path):
    torch.save({"a": torch.full((64,), 3.0)}, tmp_path / "x.bin")
    data = bytearray((tmp_path / "x.bin").read_bytes())
    data[data.find(np.float32(3.0).tobytes() * 8)] ^= 1
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(ValueError, match="CRC"):
        list(read_torch_file(tmp_path / "x.bin"))
