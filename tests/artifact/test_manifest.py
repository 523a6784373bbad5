"""`model.json`: round trip, determinism, and a message that names the field for every mistake."""

from __future__ import annotations

import dataclasses
import json

import pytest

from vssm.artifact.manifest import (
    FORMAT_VERSION,
    BlockOutput,
    CheckpointInfo,
    FreeSize,
    Manifest,
    Preprocessing,
    QuantizationInfo,
    ScheduleInfo,
    TensorInfo,
    manifest_from_json,
    manifest_to_json,
    read_manifest,
    write_manifest,
)
from vssm.errors import ArtifactError

HASH = "0123456789abcdef" * 4
SCHEDULE = ScheduleInfo(
    blocks={5: "0.8", 10: "0.75"},
    alignment="gap",
    importance="clip",
    score_direction="sum",
    gated=False,
    conv="compact",
    step_parameters="rank",
    num_keep=(157, 119),
    cls_position=98,
    seed=0,
)
MANIFEST = Manifest(
    name="vim_tiny",
    config={"depth": 24, "d_model": 192, "nested": {"a": [1, 2.5, None, "x"]}},
    inputs=(TensorInfo("images", "float32", ("batch", 3, 224, 224)),),
    outputs=(
        TensorInfo("logits", "float32", ("batch", 3)),
        TensorInfo("kept_positions_0", "int64", ("batch", 157)),
    ),
    dtype="float16",
    opset=18,
    files={"model.onnx": HASH},
    operators={"SelectiveScan": 1, "TokenGather": 1},
    versions={"torch": "2.13.0", "vssm": "0.1.0"},
    weights="checkpoint",
    schedule=SCHEDULE,
    block_outputs=(BlockOutput(1, "h1", "r1"), BlockOutput(2, "h2")),
    preprocessing=Preprocessing.for_image_size(224),
    checkpoint=CheckpointInfo("vim_t.pth", HASH),
    labels=("cat", "dog", "größer"),
)
PLAIN = Manifest(
    name="mine",
    config={},
    inputs=(TensorInfo("images", "float32", ("batch", 3, 8, 8)),),
    outputs=(TensorInfo("logits", "float32", ("batch", 2)),),
    dtype="float32",
    opset=20,
    files={},
    operators={},
    versions={},
)


@pytest.mark.parametrize("manifest", [MANIFEST, PLAIN], ids=["full", "plain"])
def test_round_trip(tmp_path, manifest):
    path = write_manifest(tmp_path, manifest)
    assert path == tmp_path / "model.json"
    assert read_manifest(tmp_path) == manifest
    assert [p.name for p in tmp_path.iterdir()] == ["model.json"]


def test_text_is_deterministic(tmp_path):
    text = manifest_to_json(MANIFEST)
    backwards = dataclasses.replace(
        MANIFEST,
        config=dict(reversed(MANIFEST.config.items())),
        versions=dict(reversed(MANIFEST.versions.items())),
        schedule=dataclasses.replace(SCHEDULE, blocks={10: "0.75", 5: "0.8"}),
    )
    assert manifest_to_json(backwards) == text
    assert text.startswith('{\n  "block_outputs": [\n    {\n      "block": 1,')
    assert text.endswith("\n}\n")
    assert json.loads(text)["format_version"] == FORMAT_VERSION == 1
    assert json.loads(text)["schedule"]["blocks"] == {"5": "0.8", "10": "0.75"}
    assert list(manifest_from_json(text).schedule.blocks) == [5, 10]


def test_schedule_blocks_come_back_in_order():
    schedule = dataclasses.replace(
        SCHEDULE, blocks={10: "0.5", 9: "1", 100: "0.5"}, num_keep=(9,) * 3
    )
    text = manifest_to_json(dataclasses.replace(MANIFEST, schedule=schedule))
    assert list(manifest_from_json(text).schedule.blocks) == [9, 10, 100]


def changed(path: str, value) -> str:
    """JSON text of MANIFEST with one field set, or deleted where value is `...`."""
    data = json.loads(manifest_to_json(MANIFEST))
    *parents, last = path.split("/")
    target = data
    for parent in parents:
        target = target[int(parent) if isinstance(target, list) else parent]
    last = int(last) if isinstance(target, list) else last
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("name", "", "name='' must be a text"),
        ("name", 3, "name=3 must be a text"),
        ("name", ..., "name is missing"),
        ("config", [], r"config=\[\] must be an object"),
        ("dtype", "float64", "dtype='float64' must be one of float32"),
        ("dtype", None, "dtype=None must be one of"),
        ("opset", 17, "opset=17 must be at least 18"),
        ("opset", True, "opset=True must be an integer"),
        ("opset", 18.0, "opset=18.0 must be an integer"),
        ("weights", "magic", "weights='magic' must be one of"),
        ("weights", "initial", "contradict"),
        ("checkpoint", None, "contradict"),
        ("checkpoint/sha256", HASH[:-1], "checkpoint.sha256=.* must be 64"),
        ("checkpoint/sha256", HASH.upper(), "checkpoint.sha256=.* must be 64"),
        ("files/model.onnx", "x", r"files\.model\.onnx='x' must be 64"),
        ("files/..", HASH, r"files has the key '\.\.'"),
        ("files/a", HASH, None),
        ("files", {"../a": HASH}, r"files has the key '\.\./a'"),
        ("files", {"/etc/passwd": HASH}, "files has the key"),
        ("files", {"": HASH}, "files has the key ''"),
        ("operators/SelectiveScan", 0, "operators.SelectiveScan=0 must be at least 1"),
        ("versions/torch", 2, "versions.torch=2 must be a text"),
        ("inputs", [], "inputs has 0 elements instead of at least 1"),
        ("inputs/0/shape/1", 0, r"inputs\[0\]\.shape\[1\]=0 must be at least 1"),
        ("inputs/0/shape/2", "height//4", r"shape\[2\]='height//4' must be an integer"),
        ("sizes", {"h": {"example": 8, "multiple": 0, "minimum": 8}}, r"sizes\.h\.multiple=0"),
        ("inputs/0/shape/1", "batch", r"inputs\[0\]\.shape\[1\]='batch' must be an integer"),
        ("inputs/0/dtype", "int8", r"inputs\[0\]\.dtype='int8' must be one of"),
        ("inputs/0/name", "logits", "name a value twice"),
        ("outputs", {}, "outputs={} must be a list"),
        ("outputs/0", 1, r"outputs\[0\]=1 must be an object"),
        ("block_outputs/0/block", 0, r"block_outputs\[0\]\.block=0 must be at least 1"),
        ("block_outputs/1/residual", "", r"block_outputs\[1\]\.residual='' must be a name"),
        ("inputs/0/name", "", r"inputs\[0\]\.name='' must be a name"),
        ("outputs/0/name", 'a"\nbackend: "evil', r"outputs\[0\]\.name=.* must be a name"),
        ("outputs/0/name", "a b", r"outputs\[0\]\.name='a b' must be a name"),
        ("outputs/0/name", "a" * 129, r"outputs\[0\]\.name=.* must be a name of at most 128"),
        ("outputs/1/name", "größe.0/x:1", None),
        ("block_outputs/0/hidden", "a\u202eb", r"hidden=.* must be a name"),
        ("name", "x\x1b[31m", r"name=.* must be a text of at most 256 .* visible"),
        ("name", "\udc80", r"name=.* must be a text .* visible"),
        ("name", "x" * 257, "name=.* must be a text of at most 256"),
        ("labels/1", "a\nb", r"labels\[1\]=.* must be a text .* visible"),
        ("labels/1", "a\u200bb", r"labels\[1\]=.* must be a text .* visible"),
        ("labels/1", "x" * 1025, r"labels\[1\]=.* must be a text of at most 1024"),
        ("labels/1", 'Weiße Maus, "Mickey" & Söhne', None),
        ("files", {"a\x1bb": HASH}, "files has the key"),
        ("operators", {"\u202e": 1}, "operators has the key"),
        ("labels", ["a", "b"], "labels has 2 names for 3 classes"),
        ("labels/1", None, r"labels\[1\]=None must be a text"),
        ("preprocessing/resize", 223, r"preprocessing.resize=223 must be in \[224, 8192\]"),
        ("preprocessing/crop", [224], "preprocessing.crop has 1 elements instead of 2"),
        ("preprocessing/std/2", 0, r"preprocessing\.std\[2\]=0 must be in \[1e-06, 1e\+06\]"),
        ("preprocessing/mean/1", 10**400, r"preprocessing\.mean\[1\] is a number that 64 bits"),
        ("preprocessing/mean/1", 1e7, r"preprocessing\.mean\[1\]=10000000.0 must be in"),
        (
            "preprocessing/crop",
            [65536, 65536],
            r"preprocessing\.crop\[0\]=65536 must be in \[1, 4096",
        ),
        (
            "preprocessing/crop",
            [224, 160],
            r"crop=\[224, 160\] makes float32 of 3 x 224 x 160 .* float32 of 3 x 224 x 224; give",
        ),
        (
            "inputs/0/shape/1",
            4,
            r"of 3 x 224 x 224 .* images is float32 of 4 x 224 x 224; give the",
        ),
        ("inputs/0/dtype", "int64", "the input images is int64 of 3 x 224 x 224"),
        ("inputs/0/shape/2", 10**30, r"inputs\[0\]\.shape\[2\] is a number that 64 bits cannot"),
        (
            "config",
            {"a": [{"b": -(10**400)}]},
            r"config\.a\[0\]\.b is a number that 64 bits cannot",
        ),
        (
            "config",
            {"module": "a.B", "rounding": 0.5},
            r"config\.rounding=0\.5 must be in \[0, 0\.01",
        ),
        ("config", {"module": "a.B", "rounding": "1"}, r"config\.rounding='1' must be a number"),
        ("config", {"module": "a.B", "rounding": None}, None),
        ("preprocessing/mean/0", "0.5", r"preprocessing\.mean\[0\]='0.5' must be a number"),
        ("preprocessing/fit", "stretch", "preprocessing.fit='stretch' must be one"),
        ("preprocessing/interpolation", "cubic", "preprocessing.interpolation='cubic' must be one"),
        ("schedule/blocks", {}, "schedule.blocks={} must be an object of at least 1"),
        ("schedule/blocks/5", "0", r"schedule\.blocks\.5='0' must be in \(0, 1\]"),
        ("schedule/blocks/5", "1.5", r"schedule\.blocks\.5='1.5' must be in \(0, 1\]"),
        ("schedule/blocks/5", 0.8, "must be a decimal number written as a string"),
        ("schedule/blocks/5", "NaN", "must be a decimal number"),
        ("schedule/blocks/x", "0.8", "'x' is not an integer of at least 1"),
        ("schedule/blocks/0", "0.8", "'0' is not an integer of at least 1"),
        ("schedule/num_keep", [157], "schedule.num_keep has 1 elements instead of 2"),
        ("schedule/num_keep", [100, 101], r"num_keep=\[100, 101\] grows"),
        ("schedule/gated", 0, "schedule.gated=0 must be true or false"),
        ("schedule/cls_position", -1, "schedule.cls_position=-1 must be at least 0"),
        ("format_version", 2, "format_version=2 is newer than 1.*update"),
        ("format_version", 0, "format_version=0 must be at least 1"),
        ("format_version", ..., "format_version is missing"),
    ],
)
def test_every_wrong_field_is_named(tmp_path, path, value, message):
    (tmp_path / "model.json").write_text(changed(path, value))
    if message is None:
        read_manifest(tmp_path)
        return
    with pytest.raises(ArtifactError, match=message) as caught:
        read_manifest(tmp_path)
    assert str(tmp_path / "model.json") in str(caught.value)
    assert "; export the model again" in str(caught.value)


@pytest.mark.parametrize("number", ["1e999", "-1e400", "9" * 5_000, "-" + "1" * 400])
def test_numbers_that_only_text_can_hold(tmp_path, number):
    text = manifest_to_json(MANIFEST).replace("0.485", number)
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"preprocessing\.mean\[0\] is a number that 64 bits"):
        read_manifest(tmp_path)


def test_deep_nesting_is_named(tmp_path):
    (tmp_path / "model.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match=r"its objects and lists are nested too deep; export"):
        read_manifest(tmp_path)


def test_a_key_that_comes_twice(tmp_path):
    text = manifest_to_json(MANIFEST).replace('"dtype": "float16"', '"dtype": "x", "dtype": "y"')
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ArtifactError, match="the key 'dtype' comes twice in one object"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format_version": NaN}', "[" * 100_000, '{"format_version": 1}'],
    ids=lambda t: t[:8],
)
def test_damaged_json(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ArtifactError, match="damaged or was edited"):
        read_manifest(tmp_path)


def test_a_newer_format_is_told_before_what_it_lacks(tmp_path):
    (tmp_path / "model.json").write_text('{"format_version": 2}')
    with pytest.raises(ArtifactError, match="format_version=2 is newer than 1"):
        read_manifest(tmp_path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "model.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ArtifactError, match="damaged"):
        read_manifest(tmp_path)


def test_truncation_at_every_length_is_an_error(tmp_path):
    text = manifest_to_json(MANIFEST).rstrip().encode()
    for length in range(len(text)):
        (tmp_path / "model.json").write_bytes(text[:length])
        with pytest.raises(ArtifactError):
            read_manifest(tmp_path)


def test_a_directory_that_is_no_export(tmp_path):
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ArtifactError, match=r"is not an export; name the directory"):
            read_manifest(directory)


@pytest.mark.parametrize(
    "wrong",
    [
        {"opset": 3},
        {"config": {"x": float("nan")}},
        {"files": {"a/b": HASH}},
        {"labels": ("one",)},
        {"outputs": (TensorInfo("a\nb", "float32", ("batch", 3)),)},
        {"name": "\udc80"},
        {"preprocessing": Preprocessing(resize=10, crop=(224, 224))},
    ],
    ids=str,
)
def test_a_wrong_manifest_is_never_written(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"manifest|JSON"):
        write_manifest(tmp_path, dataclasses.replace(MANIFEST, **wrong))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("size", "resize", "crop"),
    [(224, 256, (224, 224)), (32, 36, (32, 32)), (384, 438, (384, 384)), ((64, 96), 109, (64, 96))],
)
def test_official_preprocessing(size, resize, crop):
    spec = Preprocessing.for_image_size(size)
    assert (spec.resize, spec.crop, spec.interpolation) == (resize, crop, "bicubic")
    assert spec.mean == (0.485, 0.456, 0.406)
    assert spec.std == (0.229, 0.224, 0.225)


def test_preprocessing_fits_the_one_input() -> None:
    sizes = {name: FreeSize(224, multiple=32, minimum=64) for name in ("height", "width")}
    tensor = TensorInfo("images", "float32", ("batch", 3, "height", "width"))
    free = dataclasses.replace(MANIFEST, inputs=(tensor,), sizes=sizes)
    assert manifest_from_json(manifest_to_json(free)) == free
    other = dataclasses.replace(free, preprocessing=Preprocessing(256, (224, 200)))
    with pytest.raises(
        ValueError, match=r"3 x 224 x 200 .*width a multiple of 32 from 64 on; give"
    ):
        manifest_to_json(other)
    two = dataclasses.replace(MANIFEST, inputs=(*MANIFEST.inputs, TensorInfo("mask", "bool", (1,))))
    with pytest.raises(ValueError, match="makes one input of an image, but there are images, mask"):
        manifest_to_json(two)


def test_names_of_layers_may_be_long() -> None:
    kept = ("/" + "/".join(["a_name_of_a_module"] * 40),)
    quantized = dataclasses.replace(
        MANIFEST, quantization=QuantizationInfo("dynamic", "int8", "ort", 1, kept)
    )
    assert manifest_from_json(manifest_to_json(quantized)) == quantized


def test_a_file_from_before_merging_and_dense_models_is_read() -> None:
    document = json.loads(manifest_to_json(MANIFEST))
    del document["merge"], document["schedule"]["restore"]
    assert manifest_from_json(json.dumps(document)) == MANIFEST
