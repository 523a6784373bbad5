"""What a directory that an export is written into may and may not lose."""

from __future__ import annotations

import json
import os

import pytest
from crashes import tree

from vssm.artifact.directory import EXPORT_FILES, check_target, staged_export
from vssm.errors import ArtifactError


def write_export(directory, *, force=False, **files: bytes) -> None:
    """A small export; keyword `notes_txt` becomes the file notes.txt."""
    contents = {name.replace("_", "."): data for name, data in files.items()}
    with staged_export(directory, force=force) as staging:
        assert list(staging.iterdir()) == []
        for name, data in contents.items():
            (staging / name).write_bytes(data)
        manifest = {"files": dict.fromkeys(contents, "")}
        (staging / "model.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("existing", [False, True])
def test_a_new_export_appears_whole(tmp_path, existing):
    target = tmp_path / "out"
    if existing:
        target.mkdir()
    with staged_export(target) as staging:
        (staging / "model.onnx").write_bytes(b"onnx")
        assert target.exists() == existing
        assert not existing or not (target / "model.onnx").exists()
    assert tree(tmp_path) == {"out": None, "out/model.onnx": b"onnx"}


def test_parents_are_made_and_unmade(tmp_path):
    write_export(tmp_path / "a" / "b" / "c", model_onnx=b"1")
    assert (tmp_path / "a/b/c/model.onnx").read_bytes() == b"1"

    def fails():
        with staged_export(tmp_path / "x" / "y" / "z") as staging:
            (staging / "model.onnx").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert not (tmp_path / "x").exists()


def test_relative_targets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_export("out", model_onnx=b"1")
    write_export(".", notes_md=b"2")
    assert set(tree(tmp_path)) == {
        "out",
        "out/model.onnx",
        "out/model.json",
        "model.json",
        "notes.md",
    }


def test_an_export_is_not_overwritten_unasked(tmp_path):
    write_export(tmp_path / "out", model_onnx=b"old")
    before = tree(tmp_path)
    with pytest.raises(ArtifactError, match=r"out already holds an export .*--force"):
        write_export(tmp_path / "out", model_onnx=b"new")
    assert tree(tmp_path) == before


def test_two_exports_into_one_directory(tmp_path):
    """The second to end hears of the first, whose files stay."""

    def second(force):
        with staged_export(tmp_path / "out", force=force) as staging:
            (staging / "model.json").write_text("{}")
            write_export(tmp_path / "out", force=force, model_onnx=b"first")

    with pytest.raises(ArtifactError, match=r"written by another process meanwhile.*--force"):
        second(force=False)
    assert (tmp_path / "out" / "model.onnx").read_bytes() == b"first"
    second(force=True)
    assert tree(tmp_path) == {"out": None, "out/model.json": b"{}"}


def test_force_replaces_the_export_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    write_export(out, model_onnx=b"old", weights_safetensors=b"old", extra_bin=b"old")
    (out / "parity.json").write_bytes(b"of the old export")
    (out / "notes.txt").write_bytes(b"the user's")
    (out / "images").mkdir()
    (out / "images" / "cat.jpg").write_bytes(b"the user's")
    write_export(out, force=True, model_onnx=b"new")
    assert tree(out) == {
        "model.onnx": b"new",
        "model.json": b'{"files": {"model.onnx": ""}}',
        "notes.txt": b"the user's",
        "images": None,
        "images/cat.jpg": b"the user's",
    }


@pytest.mark.parametrize("force", [False, True])
def test_the_users_file_of_the_same_name_is_refused(tmp_path, force):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").write_bytes(b"the user's")
    before = tree(tmp_path)
    with pytest.raises(ArtifactError, match=r"holds model\.onnx, which is not ours to overwrite"):
        write_export(tmp_path / "out", force=force, model_onnx=b"new")
    with pytest.raises(ArtifactError, match=r"holds model\.onnx, which is not ours"):
        check_target(tmp_path / "out", force=force)  # before the work, too
    assert tree(tmp_path) == before


@pytest.mark.parametrize("manifest", ["{", "[]", '{"files": 3}', '{"files": {"../victim": ""}}'])
def test_force_over_a_damaged_manifest(tmp_path, manifest):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "victim").write_bytes(b"outside")
    (out / "model.json").write_text(manifest)
    (out / "model.onnx").write_bytes(b"old")
    write_export(out, force=True, model_onnx=b"new")
    assert (out / "model.onnx").read_bytes() == b"new"
    assert (tmp_path / "victim").read_bytes() == b"outside"


@pytest.mark.parametrize("failing", range(1, 8))
def test_a_failure_while_moving_puts_everything_back(tmp_path, monkeypatch, failing):
    out = tmp_path / "out"
    write_export(out, model_onnx=b"old", weights_safetensors=b"old")
    (out / "notes.txt").write_bytes(b"the user's, so entries are moved one by one")
    before = tree(tmp_path)
    replace, calls = os.replace, []

    def flaky(source, destination):
        calls.append(source)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", flaky)
    if failing <= 6:  # three old files out, three new ones in
        with pytest.raises(ArtifactError, match="Input/output error"):
            write_export(out, force=True, model_onnx=b"new", weights_safetensors=b"new")
        assert tree(tmp_path) == before
    else:
        write_export(out, force=True, model_onnx=b"new", weights_safetensors=b"new")
        assert (out / "model.onnx").read_bytes() == b"new"


def test_the_manifest_is_moved_first_out_and_last_in(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_export(out, model_onnx=b"old")
    (out / "notes.txt").write_bytes(b"the user's, so entries are moved one by one")
    replace, moved = os.replace, []
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(b.name), replace(a, b)))
    write_export(out, force=True, model_onnx=b"new")
    assert moved == ["model.json", "model.onnx", "model.onnx", "model.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_of_the_writer_changes_nothing(tmp_path, error):
    out = tmp_path / "out"
    write_export(out, model_onnx=b"old")
    before = tree(tmp_path)

    def fails(target):
        with staged_export(target, force=True) as staging:
            (staging / "model.onnx").write_bytes(b"half")
            raise error

    for target in (out, tmp_path / "new"):
        with pytest.raises(error):
            fails(target)
        assert tree(tmp_path) == before


def test_a_full_disk_is_an_artifact_error(tmp_path):
    def full():
        with staged_export(tmp_path / "out"):
            raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match="No space left"):
        full()
    assert tree(tmp_path) == {}


def test_targets_that_are_no_directory(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(ArtifactError, match=f"{name} is not a directory; name another path"):
            write_export(tmp_path / name, force=True)
    with pytest.raises(ArtifactError, match=r"cannot be written.*; name a directory"):
        write_export(tmp_path / "file" / "below" / "out")
    assert tree(tmp_path)["file"] == b"x"


def test_a_link_to_a_directory_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_export(tmp_path / "link", model_onnx=b"1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.onnx").read_bytes() == b"1"


def test_the_names_are_those_of_the_contract():
    assert {"model.onnx", "model.json", "weights.safetensors", "parity.json"} < EXPORT_FILES
