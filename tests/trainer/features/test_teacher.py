"""The backbone's distributions: computed or read, they are the softmax of its own logits, each at its own token."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from heads.base import Features
from ops.row_plan import RowPlan
from runtime import jt
from tests.small import small_backbone
from trainer.features import top_k
from trainer.features.teacher import BackboneTeacher, StoredTeacher, open_teacher
from trainer.features.top_k import KEY, TopKWriter, open_shards, top_k_folder

K, STORED_K = 5, 8
LENGTHS = (9, 4, 17, 6, 12)


class Identity:
    """A tokenizer whose messages are already token ids."""

    fingerprint = "identity"

    def encode_many_with_mask(self, conversations):
        yield from ((ids, [True] * len(ids)) for ids in conversations)


@pytest.fixture(scope="module")
def texts():
    random = np.random.default_rng(1)
    return [random.integers(0, 64, length).astype(np.int32) for length in LENGTHS]


def write(backbone, texts, folder, k=STORED_K):
    """The top-k files of these texts, several to a folder."""
    folder.mkdir(parents=True)
    writer = TopKWriter(backbone, Identity(), k, folder / "partial", folder / "corpus.jsonl.top")
    for text in texts:
        writer.add(text.tolist(), len(text))
    writer.finish()
    writer.publish()
    return folder / "corpus.jsonl.top"


@pytest.fixture(scope="module")
def stored(backbone, texts, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_k, "SHARD_TOKENS", 12)
        patch.setattr(top_k, "PASS_TOKENS", 14)
        folder = write(backbone, texts, tmp_path_factory.mktemp("teacher") / "corpus")
    assert len(open_shards(folder)) == 3
    return folder


def batch_of(backbone, texts):
    """(features, token_ids, offsets) as a training step has them."""
    token_ids, lengths = np.concatenate(texts), [len(text) for text in texts]
    hidden = backbone.forward(token_ids[None], attend=RowPlan.sequences(lengths), logits=None).hidden
    return Features(hidden, lengths=tuple(lengths)), token_ids, np.cumsum([0, *lengths])


def expected(backbone, texts, k):
    """(ids, probabilities) by a full softmax of the logits of one text at a time, in NumPy."""
    logits = np.concatenate([backbone.forward(text[None]).logits.numpy()[0] for text in texts]).astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    ids = np.argsort(-p, 1, kind="stable")[:, :k]
    return ids, np.take_along_axis(p, ids, 1)


def taught(teacher, batch):
    ids, probabilities = teacher(*batch)
    assert (ids.dtype, probabilities.dtype) == ("int32", "float32")
    return ids.numpy(), probabilities.numpy()


# The backbone --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most_rows", [1000, 11])
def test_the_backbone_teaches_the_softmax_of_its_own_logits(backbone, texts, monkeypatch, most_rows):
    sizes, multiply = [], jt.nn.matmul_transpose
    monkeypatch.setattr(top_k, "LOGIT_BYTES", most_rows * 64 * 4)
    monkeypatch.setattr(jt.nn, "matmul_transpose", lambda x, w: sizes.append(x.shape[0]) or multiply(x, w))
    batch = batch_of(backbone, texts)
    batch[0].hidden = jt.array(batch[0].hidden.numpy())
    assert not batch[0].hidden.is_stop_grad() and BackboneTeacher(backbone, K)(*batch)[1].is_stop_grad()
    assert sum(sizes) == sum(LENGTHS) and max(sizes) <= most_rows
    ids, probabilities = taught(BackboneTeacher(backbone, K), batch)
    true_ids, true = expected(backbone, texts, K)
    true /= true.sum(1, keepdims=True)
    assert ids.shape == probabilities.shape == (sum(LENGTHS), K)
    assert (ids == true_ids).all()
    # oneDNN and the row-invariant kernel of lm_logits add up in different orders.
    assert np.abs(probabilities - true).max() < 1e-5
    assert np.abs(probabilities - np.roll(true, 1, 0)).max() > 0.1  # a teacher one row off would be noticed


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_file_holds_the_tokens_and_their_true_probabilities(backbone, texts, stored):
    shards = [load_file(path) for path in sorted(stored.iterdir())]
    assert [shard["offsets"].tolist() for shard in shards] == [[0, 9, 13], [0, 17], [0, 6, 18]]
    arrays = {name: np.concatenate([shard[name] for shard in shards]) for name in ("token_ids", "ids", "probabilities")}
    assert (arrays["token_ids"] == np.concatenate(texts)).all()
    assert [arrays[name].dtype for name in arrays] == [np.int32, np.int32, np.float16]
    ids, true = expected(backbone, texts, STORED_K)
    assert (arrays["ids"] == ids).all()
    assert np.abs(arrays["probabilities"] - true).max() < 2**-11 and arrays["probabilities"].sum(1).max() < 0.999


def test_a_file_teaches_what_the_backbone_does_up_to_float16_rounding(backbone, texts, stored):
    order = [3, 0, 4, 2, 1]
    batch = batch_of(backbone, [texts[i] for i in order])
    ids, probabilities = taught(StoredTeacher(stored, K), batch)
    true_ids, true = taught(BackboneTeacher(backbone, K), batch)
    assert (ids == true_ids).all()
    # Each probability is rounded by at most 2^-11 of itself, and so is their sum.
    assert (np.abs(probabilities - true) <= true * 2**-10 + 1e-6).all()
    assert np.abs(probabilities.sum(1) - 1).max() < 1e-6
    other = taught(StoredTeacher(stored, K), batch_of(backbone, texts))[1]
    assert np.abs(other - true).max() > 0.1


def test_texts_of_any_length_have_the_distributions_of_their_beginnings(backbone, texts, tmp_path):
    long = np.arange(140, dtype=np.int32) % 64  # more than the backbone's positions
    teacher = StoredTeacher(write(backbone, [texts[2], long, texts[2][:9]], tmp_path / "beginnings"), K)
    ids, probabilities = taught(teacher, batch_of(backbone, [texts[2][:9], texts[2], long[:128]]))
    assert (ids[:9] == ids[9:18]).all() and np.abs(probabilities[:9] - probabilities[9:18]).max() < 1e-3
    assert (ids[9 + len(texts[2]) :] == expected(backbone, [long[:128]], K)[0]).all()


def test_a_truncated_sequence_is_found(backbone, texts, stored):
    teacher = StoredTeacher(stored, K)
    for most in (8, 5, 8):
        cut = [text[:most] for text in texts]
        ids, probabilities = taught(teacher, batch_of(backbone, cut))
        true_ids, true = taught(BackboneTeacher(backbone, K), batch_of(backbone, cut))
        assert (ids == true_ids).all() and np.abs(probabilities - true).max() < 1e-3


def test_other_text_is_refused_by_name(backbone, texts, stored):
    teacher = StoredTeacher(stored, K)
    other, longer = texts[2].copy(), np.append(texts[2], np.int32(3))
    other[-1] += 1 if other[-1] < 63 else -1
    for wrong in (other, longer, texts[2][1:], np.concatenate(texts[:2])):
        with pytest.raises(ValueError, match=rf"--teacher .*top does not hold conversation 1 \({len(wrong)} tokens"):
            teacher(*batch_of(backbone, [texts[0], wrong]))
    assert len(teacher.locate(np.concatenate(texts), np.cumsum([0, *LENGTHS]))) == len(LENGTHS)


def test_two_texts_with_the_same_hash_are_told_apart(backbone, texts, stored, monkeypatch):
    monkeypatch.setattr("trainer.features.teacher.token_hash", lambda token_ids: "same")
    with pytest.raises(ValueError, match="does not hold"):
        taught(StoredTeacher(stored, K), batch_of(backbone, texts[:2]))


def test_a_hand_worked_row_is_renormalized(tmp_path):
    tensors = {
        "token_ids": np.array([7, 8], np.int32),
        "offsets": np.array([0, 2], np.int64),
        "ids": np.array([[4, 2, 9], [1, 2, 3]], np.int32),
        "probabilities": np.array([[0.5, 0.25, 0.125], [0, 0, 0]], np.float16),
    }
    path = tmp_path / "00000.safetensors"
    path.write_bytes(save(tensors, {KEY: json.dumps({"k": 3, "backbone": "b"})}))
    ids, probabilities = taught(StoredTeacher(path, 2), (None, tensors["token_ids"], tensors["offsets"]))
    assert ids.tolist() == [[4, 2], [-1, -1]]
    assert np.allclose(probabilities, [[2 / 3, 1 / 3], [0, 0]])


def test_too_many_tokens_and_another_backbone_are_refused(backbone, stored):
    assert isinstance(open_teacher(backbone, K), BackboneTeacher)
    assert isinstance(open_teacher(backbone, K, str(stored)), StoredTeacher)
    with pytest.raises(ValueError, match="--kl-top is 65, expected 1 to the 64"):
        open_teacher(backbone, 65)
    with pytest.raises(ValueError, match=rf"--kl-top is 9, .* holds the {STORED_K} most probable"):
        open_teacher(backbone, STORED_K + 1, str(stored))
    with pytest.raises(ValueError, match=r"was written by backbone .*, not by this one"):
        open_teacher(small_backbone(seed=1), K, str(stored))


def test_damaged_and_foreign_files_are_refused_by_name(stored, tmp_path):
    corpus = stored.with_name("corpus.jsonl")
    with pytest.raises(ValueError, match=f"did you mean {top_k_folder(corpus)}"):
        StoredTeacher(corpus, K)
    with pytest.raises(ValueError, match="holds no top-k files"):
        StoredTeacher(tmp_path, K)
    complete, path = (stored / "00000.safetensors").read_bytes(), tmp_path / "00000.safetensors"
    for damaged in (complete[:-1], complete[:100], b"", save({"weight": np.zeros(3)})):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is damaged or holds no top-k probabilities"):
            StoredTeacher(tmp_path, K)
    tensors = load_file(stored / "00000.safetensors")
    about = {KEY: json.dumps({"k": STORED_K, "backbone": "b"})}
    path.write_bytes(save(tensors | {"ids": tensors["ids"][1:]}, about))
    with pytest.raises(ValueError, match="is damaged: its parts have the shapes"):
        StoredTeacher(tmp_path, K)
    path.write_bytes(save(tensors, about))
    (tmp_path / "00001.safetensors").write_bytes(complete)
    with pytest.raises(ValueError, match="differ in backbone"):
        StoredTeacher(tmp_path, K)


# Writing -------------------------------------------------------------------------------------------------------------


def test_a_complete_file_of_the_same_tokens_is_reused_and_any_other_rewritten(
    backbone, texts, stored, tmp_path, monkeypatch
):
    monkeypatch.setattr(top_k, "SHARD_TOKENS", 12)
    monkeypatch.setattr(top_k, "PASS_TOKENS", 14)
    folder, computed = tmp_path / "top", []
    folder.mkdir()
    for path in stored.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "00001.safetensors").write_bytes(b"torn")
    (folder / "00002.safetensors").write_bytes((stored / "00000.safetensors").read_bytes())
    for name in ("00003.safetensors", "00001.partial"):
        (folder / name).write_bytes(b"left over")
    forced = TopKWriter._forced
    monkeypatch.setattr(
        TopKWriter, "_forced", lambda self, ids, offsets: computed.append(len(ids)) or forced(self, ids, offsets)
    )
    place = tmp_path / "place"
    place.mkdir()
    (place / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not a folder of only top-k files"):
        TopKWriter(backbone, Identity(), K, folder, place)
    (place / "thesis.tex").unlink()
    writer = TopKWriter(backbone, Identity(), STORED_K, folder, place)
    for text in texts:
        writer.add(text.tolist(), len(text))
    writer.finish()
    assert computed == [17, 18]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in stored.iterdir()}
