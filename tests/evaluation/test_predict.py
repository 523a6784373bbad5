"""`vssm predict`: sources, rows, unreadable images, and what a stopped run leaves."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from command import Run
from exports import exported, micro
from PIL import Image

import vssm
from vssm.errors import ArtifactError
from vssm.evaluation.predict import _columns
from vssm.evaluation.sources import open_source

pyarrow = pytest.importorskip("pyarrow", reason="the extra `predict` is not installed")
parquet = pytest.importorskip("pyarrow.parquet")

COUNT = 11
BAD = 4  # the image that is none


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("predict"), micro())


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same images, one of them torn, in each kind of source."""
    root = tmp_path_factory.mktemp("sources")
    make = np.random.default_rng(0)
    contents = {}
    for i in range(COUNT):
        pixels = make.integers(0, 256, (*make.integers(50, 90, 2), 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        contents[f"{i:02}.png"] = data.getvalue()[: 200 if i == BAD else None]
    (root / "folder").mkdir()
    for name, data in contents.items():
        (root / "folder" / name).write_bytes(data)
    (root / "list.txt").write_text("".join(f"folder/{name}\n\n" for name in contents))
    (root / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(root / "shards" / f"{shard}.tar", "w") as archive:
            for name, data in list(contents.items())[6 * shard :][: 6 - shard]:
                for part, content in ((name, data), (f"{name[:2]}.cls", b"3")):
                    member = tarfile.TarInfo(part)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    cells = [{"bytes": data, "path": name} for name, data in contents.items()]
    table = pyarrow.table({"image": cells, "label": list(range(COUNT))})
    parquet.write_table(table, root / "images.parquet", row_group_size=4)
    return root


def _predict(export, source, target, **options):
    given = {"batch": 2, "block": 3, "workers": 0, "threads": 1, **options}
    return vssm.predict(export, source, target, **given)


def _rows(path):
    return parquet.read_table(path).to_pylist()


@pytest.fixture(scope="module")
def whole(export, sources, tmp_path_factory):
    """The file that a run without a stop writes, and its report."""
    target = tmp_path_factory.mktemp("whole") / "out.parquet"
    return target, _predict(export, sources / "folder", target, tensors=["logits"])


def test_rows_are_what_the_session_gives(export, sources, whole):
    target, report = whole
    files = [file for file in sorted((sources / "folder").iterdir()) if file.stem != f"{BAD:02}"]
    with vssm.open_session(export, threads=1) as session:
        found = session.run(vssm.preprocess(files, export))
    rows = _rows(target)
    assert [row["image"] for row in rows] == [f"{i:02}.png" for i in range(COUNT)]
    assert (report.images, report.resumed, report.source) == (COUNT, 0, "folder")
    bad = rows.pop(BAD)
    assert report.unreadable == ((f"{BAD:02}.png", bad["error"]),)
    assert "cannot be read as an image" in bad["error"]
    assert {value for key, value in bad.items() if key not in {"image", "error"}} == {None}
    logits = found["logits"]
    np.testing.assert_allclose([row["logits"] for row in rows], logits, rtol=1e-5, atol=1e-5)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    assert [row["classes"] for row in rows] == best.tolist()
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wanted = np.take_along_axis(shares, best, 1)
    np.testing.assert_allclose([row["probabilities"] for row in rows], wanted, rtol=1e-4)
    for stage in range(2):
        kept = [row[f"kept_positions_{stage}"] for row in rows]
        assert kept == found[f"kept_positions_{stage}"].tolist()
    assert parquet.ParquetFile(target).num_row_groups == 4
    assert sorted(p.name for p in target.parent.iterdir()) == ["out.parquet"]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("list.txt", "folder/00.png"),
        ("shards", "0.tar/00.png"),
        ("shards/0.tar", "0.tar/00.png"),
        ("images.parquet", "images.parquet#0"),
    ],
)
def test_every_source_gives_the_same_rows(export, sources, whole, tmp_path, name, first):
    report = _predict(export, sources / name, tmp_path / "out.parquet", tensors=["logits"])
    rows, wanted = _rows(tmp_path / "out.parquet"), _rows(whole[0])
    assert rows[0]["image"] == first
    assert len(report.unreadable) == 1
    assert f"image={rows[BAD]['image']}" in rows[BAD]["error"].replace(f"{sources}/", "")
    for row, other in zip(rows, wanted, strict=name != "shards/0.tar"):
        same = {key: value for key, value in row.items() if key not in {"image", "error"}}
        assert same.items() <= other.items()
    if "shards" in name:
        assert report.notes == (
            f"{len(rows)} members that are no images by their names are passed over",
        )


def test_workers_change_nothing(export, sources, whole, tmp_path):
    target, names = tmp_path / "out.parquet", ["image", "error"]
    _predict(export, sources / "images.parquet", target, workers=1, tensors=["logits"])
    wanted, found = parquet.read_table(whole[0]), parquet.read_table(target)
    assert found.drop_columns(names) == wanted.drop_columns(names)


class _StopError(Exception):
    pass


def _stop_after(blocks):
    def progress(phase, done, total, note=""):
        if (phase, done, total) == ("scoring images", 3 * blocks, COUNT):
            raise _StopError

    return progress


def test_a_stopped_prediction_goes_on(export, sources, whole, tmp_path):
    target, options = tmp_path / "out.parquet", {"tensors": ["logits"]}
    with pytest.raises(_StopError):
        _predict(export, sources / "folder", target, progress=_stop_after(2), **options)
    blocks = tmp_path / "out.parquet.blocks"
    assert not target.exists()
    assert sorted(p.name for p in blocks.glob("*.parquet")) == ["000000.parquet", "000001.parquet"]
    torn = blocks / "000001.parquet"
    torn.write_bytes(torn.read_bytes()[:-5])
    (blocks / ".000002.parquet.vssm-0123456789ab").write_text("half")
    with pytest.raises(ArtifactError, match="of another prediction: block=3, now 4; run it to"):
        _predict(export, sources / "folder", target, block=4, **options)
    with pytest.raises(ArtifactError, match="of another prediction: columns="):
        _predict(export, sources / "folder", target)
    with pytest.raises(ArtifactError, match="of another prediction: images="):
        _predict(export, sources / "list.txt", target, **options)
    told = []
    options["progress"] = lambda *step: told.append(step[1:3])
    report = _predict(export, sources / "folder", target, **options)
    assert report.resumed == 3
    assert told == [(done, 8) for done in (0, 2, 3, 5, 6, 8)]  # batches of two, blocks of three
    assert target.read_bytes() == whole[0].read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out.parquet"]


def test_blocks_of_nobody_are_not_taken(export, sources, whole, tmp_path):
    target, blocks = tmp_path / "out.parquet", tmp_path / "out.parquet.blocks"
    blocks.mkdir()
    (blocks / "000000.parquet").write_bytes(whole[0].read_bytes())
    with pytest.raises(ArtifactError, match=r"holds files, but not run\.journal"):
        _predict(export, sources / "folder", target)
    (blocks / "mine.txt").write_text("stays")
    _predict(export, sources / "folder", target, restart=True, tensors=["logits"])
    assert target.read_bytes() == whole[0].read_bytes()
    assert [p.name for p in blocks.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch=0 is below 1"),
        ({"block": 0}, "block=0 is below 1"),
        ({"top": 8}, "top=8 is above 7, the classes"),
        ({"tensors": ["features"]}, "is not an output of this export; it has logits, kept_pos"),
        ({"tensors": ["kept_positions_0"]}, "is the name of another column"),
        ({"column": "image"}, "no Parquet: leave it out"),
    ],
)
def test_options_that_do_not_fit(export, sources, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _predict(export, sources / "folder", tmp_path / "out.parquet", **options)
    assert list(tmp_path.iterdir()) == []


def test_sources_that_are_refused(sources, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = [
        (tmp_path / "absent", "is not there"),
        (tmp_path / "empty", "holds no images"),
        (sources, r"holds .parquet and .tar files beside others"),
        (sources / "folder/00.png", "for single images use `vssm run`"),
    ]
    (tmp_path / "a.TAR").write_bytes(b"\x1f\x8b" + bytes(600))
    cases.append((tmp_path / "a.TAR", "cannot be read as an uncompressed tar file"))
    parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "numbers.parquet")
    cases.append((tmp_path / "numbers.parquet", "one column of image bytes .*, but none"))
    parquet.write_table(pyarrow.table({"a": [b""], "b": [b""]}), tmp_path / "two.parquet")
    cases.append((tmp_path / "two.parquet", "the columns a, b do: say --column"))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    cases.append((tmp_path / "torn.parquet", "cannot be read as a Parquet file"))
    (tmp_path / "list.txt").write_bytes(b"\xff\n")
    cases.append((tmp_path / "list.txt", "give a UTF-8 text file"))
    for source, message in cases:
        with pytest.raises(ValueError, match=message):
            open_source(source)
    assert open_source(tmp_path / "two.parquet", column="b").names == ("two.parquet#0",)
    with pytest.raises(ValueError, match=r"column='c' .* these do: a, b"):
        open_source(tmp_path / "two.parquet", column="c")


def test_a_tensor_without_an_entry_for_each_image_is_refused(export):
    manifest = export.manifest
    table = replace(manifest.outputs[0], name="table", shape=(5, 12))
    with pytest.raises(ValueError, match=r"tensors='table' of shape \[5, 12\] has no entry for"):
        _columns(replace(manifest, outputs=(*manifest.outputs, table)), 5, ["table"])


def test_the_command(export, sources, tmp_path, cli: Run):
    target, report = tmp_path / "out.parquet", tmp_path / "report.json"
    arguments = (export.directory, sources / "shards", "-o", target, "--top=2", "--workers=0")
    assert cli("predict", *arguments, "--json", report) == 0, cli.out
    assert "images that cannot be read │ 1" in cli.out
    assert "not read: 0.tar/04.png" in cli.out
    assert "note: 11 members" in cli.out
    assert len(_rows(target)[0]["classes"]) == 2
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "text.png").write_text("none")
    arguments = (export.directory, tmp_path / "none", "-o", target, "--workers=0")
    assert cli("predict", *arguments) == 2
    assert "none of the 1 images can be read" in cli.out
    assert "its format is not known here" in cli.out
    assert len(_rows(target)) == 1
    assert cli("predict", export.directory, sources, "-o", tmp_path / "out.csv") == 2
    assert "is to be a Parquet file" in cli.out
