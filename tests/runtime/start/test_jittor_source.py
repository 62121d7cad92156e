"""The copy of Jittor that is imported: every replacement finds its place, and the installed package stays as it is."""

import dataclasses
import hashlib

import pytest

from runtime.start.jittor_source import (
    PACKAGES,
    PATCHES,
    SourceError,
    apply_patches,
    installed_sources,
    patched_sources,
)


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for package in PACKAGES
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_copy_differs_from_the_installed_package_in_the_named_places_alone(tmp_path):
    before = hashes(installed_sources())
    copy = patched_sources(tmp_path)
    after = hashes(copy)
    assert hashes(installed_sources()) == before
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] != before[name]} == {patch.file for patch in PATCHES}
    for patch in PATCHES:
        assert patch.new in (copy / patch.file).read_text(encoding="utf-8"), patch.why


def test_the_copy_is_made_once_and_named_by_its_contents(tmp_path):
    copy = patched_sources(tmp_path)
    made = copy.stat().st_ino
    assert patched_sources(tmp_path) == copy and copy.stat().st_ino == made
    other = patched_sources(tmp_path, PATCHES[:1])
    assert other != copy
    with pytest.raises(SourceError):  # one that cannot be patched leaves no files
        patched_sources(tmp_path, (dataclasses.replace(PATCHES[0], old="not in any file of Jittor"),))
    assert set(tmp_path.iterdir()) == {copy, other}


@pytest.mark.parametrize("text", ["", "abcabc"])
def test_another_jittor_is_an_error_that_names_its_version(tmp_path, text):
    (tmp_path / "jittor").mkdir()
    (tmp_path / "jittor" / "x.cc").write_text(text)
    patch = dataclasses.replace(PATCHES[0], file="jittor/x.cc", old="abc", new="d")
    said = r"Jittor 1\.4\.0 is not the 1\.3\.11\.0 .*'abc' \d times.*pip install jittor==1\.3\.11\.0"
    with pytest.raises(SourceError, match=said):
        apply_patches(tmp_path, (patch,), "1.4.0")
    assert (tmp_path / "jittor" / "x.cc").read_text() == text
