"""The parity check passes what is right and names what is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exports import AS_RELEASED, exported, images, micro
from onnx import numpy_helper

import vssm
from vssm.artifact.directory import Artifact
from vssm.artifact.manifest import write_manifest
from vssm.artifact.reference import OracleResult
from vssm.files.atomic import sha256_of
from vssm.parity.compare import TOLERANCES, _disagreements, compare_array
from vssm.runtimes.graph_edit import expose, force_positions
from vssm.runtimes.ort import OrtCpuSession
from vssm.runtimes.torch import oracle


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported(tmp_path_factory.mktemp("parity"), micro())


@pytest.mark.parametrize("backend", ["kernel", "body"])
def test_a_right_export_passes(artifact: Artifact, backend: str) -> None:
    report = vssm.check_parity(None, artifact, backend=backend, per_block=True)
    assert report.passed
    assert report.info.backend == backend
    assert report.kept_agreement == [1.0, 1.0]
    assert report.top1_agreement == 1.0
    assert [b.name for b in report.blocks][:2] == ["block_1.hidden", "block_1.residual"]
    assert len(report.blocks) == 6
    assert report.first_bad_block is None


# The first is an export of tests/onnx/test_export.py, too.
@pytest.mark.parametrize(
    ("rules", "config"),
    [(AS_RELEASED, {"class_token": "head"}), ({"alignment": "constant"}, {}), (None, {})],
    ids=str,
)
def test_every_kind_of_stage_can_be_forced(
    tmp_path: Path, rules: dict[str, str] | None, config: dict[str, str]
) -> None:
    model = micro("1:1.0,2:0.6", rules=rules, **config) if rules else micro(None)
    report = vssm.check_parity(model, exported(tmp_path, model), images=images(model, 3))
    assert report.passed
    assert len(report.kept_agreement) == (2 if rules else 0)


def test_float16_passes_its_own_tolerance(tmp_path: Path) -> None:
    report = vssm.check_parity(None, exported(tmp_path, micro(), dtype="float16"))
    assert report.passed
    assert TOLERANCES["float32"].logits < report.forced.relative < TOLERANCES["float16"].logits


def broken(artifact: Artifact, tmp_path: Path, name: str, factor: float) -> Artifact:
    """A copy of the export with one initializer scaled, its hashes brought up to date."""
    directory = tmp_path / "broken"
    directory.mkdir()
    model = onnx.load(artifact.model_path)
    for initializer in model.graph.initializer:
        if initializer.name == name:
            scaled = numpy_helper.to_array(initializer) * np.float32(factor)
            initializer.CopyFrom(numpy_helper.from_array(scaled, name))
    onnx.save(model, directory / "model.onnx")
    weights = directory / "weights.safetensors"
    weights.write_bytes(artifact.read_weights())
    files = {p.name: sha256_of(p) for p in directory.iterdir()}
    manifest = dataclasses.replace(artifact.manifest, files=files)
    write_manifest(directory, manifest)
    return Artifact(directory, manifest)


def test_a_wrong_weight_fails_and_its_block_is_named(artifact: Artifact, tmp_path: Path) -> None:
    bad = broken(artifact, tmp_path, "layers.2.mixer.conv1d.bias+conv1d_b.bias.Concat", 1.01)
    report = vssm.check_parity(None, bad, per_block=True)
    assert not report.passed
    assert report.first_bad_block == "block_3.hidden"
    assert any("first block out of tolerance: block_3.hidden" in f for f in report.failures)
    assert all(b.passed for b in report.blocks if b.name.startswith(("block_1", "block_2")))


def test_other_choices_are_listed_with_their_margin(artifact: Artifact, tmp_path: Path) -> None:
    """Forced positions still compare the numbers; the free run shows the different choices."""
    bad = broken(artifact, tmp_path, "layers.0.mixer.conv1d.bias+conv1d_b.bias.Concat", -3.0)
    report = vssm.check_parity(None, bad)
    assert report.kept_agreement[0] < 1.0
    first = [d for d in report.disagreements if d.stage == 0]
    assert first
    assert all(d.margin is not None and d.margin > 0 for d in first)
    assert report.images_alike < 4
    assert any("chosen otherwise at a relative score margin" in f for f in report.failures)


def test_margin_is_the_oracles(artifact: Artifact, tmp_path: Path) -> None:
    bad = broken(artifact, tmp_path, "layers.0.mixer.conv1d.bias+conv1d_b.bias.Concat", -3.0)
    x = images(micro(), 2)
    report = vssm.check_parity(None, bad, images=x)
    found = next(d for d in report.disagreements if d.stage == 0)
    with torch.no_grad():
        scores = micro().double().forward_details(torch.from_numpy(x).double()).scores[0]
    score = scores[found.image].clone()
    score[18] = torch.inf  # the class token is protected
    with vssm.open_session(bad) as session:
        kept = session.run(x)["kept_positions_0"][found.image]
    chosen = scores[found.image].topk(27).indices
    instead = score[[place for place in kept if place != 18 and place not in chosen]]
    want = float((score[found.position] - instead.min()) / scores[found.image].abs().max())
    assert found.margin == pytest.approx(want, rel=1e-9)


def chosen(kept: list[int], *, scores: list[float], want: list[int]) -> list[float | None]:
    """Margins of one image's positions, of which the oracle keeps `want` and protects 0."""
    result = OracleResult(
        logits=np.ones((1, 2)),
        kept_positions=[np.array([want])],
        scores=[np.array([scores])],
        positions=[np.arange(len(scores))[None]],
        blocks={},
    )
    return [d.margin for d in _disagreements([np.array([kept])], result, 0)]


def test_margin_tells_a_tie_from_a_wrong_choice() -> None:
    scores = [0.0, 4.0, 1.0, 1.0 - 1e-7, 0.1]
    assert chosen([0, 1, 2], scores=scores, want=[0, 1, 2]) == []
    assert chosen([0, 1, 3], scores=scores, want=[0, 1, 2]) == [pytest.approx(1e-7 / 4, rel=1e-6)]
    # The oracle's second best is close, but the one kept instead is far below both.
    assert chosen([0, 1, 4], scores=scores, want=[0, 1, 2]) == [pytest.approx(0.9 / 4)]
    # Scores of both signs: a cut near zero is as fine a choice as any other.
    signed = [0.0, 4.0, 1e-9, -1e-9, -4.0]
    assert chosen([0, 1, 3], scores=signed, want=[0, 1, 2]) == [pytest.approx(5e-10)]


def test_no_score_excuses_a_lost_class_token_or_a_place_twice() -> None:
    scores = [0.0, 4.0, 3.0, 2.0]
    assert chosen([1, 2], scores=scores, want=[0, 1]) == [np.inf]
    assert chosen([0, 0], scores=scores, want=[0, 1]) == [np.inf]
    assert chosen([0, 9], scores=scores, want=[0, 1]) == [np.inf]
    assert chosen([0, 1, 2, 2], scores=scores, want=[0, 1, 2, 3]) == [np.inf]


def test_images_chosen_alike_are_compared_though_others_are_not(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image's tie must not hide another's wrong logits."""
    good = OrtCpuSession.run

    def spoilt(session: OrtCpuSession, x: np.ndarray) -> dict[str, np.ndarray]:
        outputs = good(session, x)
        kept = outputs["kept_positions_0"]
        kept[0, -1] = np.setdiff1d(np.arange(37), kept[0])[0]
        outputs["logits"][1] *= 1.01
        return outputs

    monkeypatch.setattr(OrtCpuSession, "run", spoilt)
    report = vssm.check_parity(None, artifact)
    assert report.images_alike == 3
    assert report.free_logits is not None
    assert any(f.startswith("free-running logits") for f in report.failures)


def test_a_model_of_one_class_can_be_checked(tmp_path: Path) -> None:
    assert vssm.check_parity(None, exported(tmp_path, micro(None, depth=1, num_classes=1))).passed


@pytest.mark.parametrize(
    "other",
    [{"schedule": None}, {"schedule": "1:0.5"}, {"rules": {"alignment": "none"}}, {"depth": 4}],
    ids=str,
)
def test_another_model_is_no_oracle(artifact: Artifact, other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is not the model of this export.*export it again"):
        vssm.check_parity(micro(**other), artifact)


def test_forced_graph_keeps_what_it_is_given(artifact: Artifact) -> None:
    """Any positions can be forced, not only the oracle's."""
    model = onnx.load(artifact.model_path)
    names = force_positions(model)
    expose(model, ["block_1.hidden"])
    assert names == ["forced_positions_0", "forced_positions_1"]
    rng = np.random.default_rng(5)
    first = np.stack([np.sort(rng.permutation(37)[:27]) for _ in range(2)]).astype(np.int32)
    second = np.stack([np.sort(rng.permutation(row)[:21]) for row in first]).astype(np.int32)
    with OrtCpuSession(artifact, backend="body", model=model.SerializeToString()) as session:
        feeds = {"images": images(micro(), 2), names[0]: first, names[1]: second}
        got = session.run_feeds(feeds)
    np.testing.assert_array_equal(got["kept_positions_0"], first)
    np.testing.assert_array_equal(got["kept_positions_1"], second)
    assert got["block_1.hidden"].shape == (2, 37, 20)


def test_compare_array_fails_on_nan_and_shape() -> None:
    want = np.array([[1.0, -4.0]])
    assert compare_array("x", want + 3.9e-5, want, 1e-5).passed
    assert not compare_array("x", want + 4.1e-5, want, 1e-5).passed
    assert not compare_array("x", np.array([[np.nan, -4.0]]), want, 1e-5).passed
    assert not compare_array("x", np.ones((1, 3)), want, 1e-5).passed
    nothing = compare_array("x", want, np.array([[np.nan, -4.0]]), 1e-5)
    assert not nothing.passed
    assert nothing.relative == np.inf


def test_the_oracle_cannot_be_checked_against_itself(artifact: Artifact) -> None:
    with pytest.raises(ValueError, match=r"runtime='torch' is the oracle itself"):
        vssm.check_parity(None, artifact, "torch")


def test_oracle_leaves_the_model_in_its_dtype(artifact: Artifact) -> None:
    model = micro()
    result = oracle(model, artifact, images(model, 2))
    assert result.logits.dtype == np.float64
    assert next(model.parameters()).dtype == torch.float32
    assert set(result.blocks) == {
        f"block_{b}.{s}" for b in (1, 2, 3) for s in ("hidden", "residual")
    }


def test_groupmamba_has_a_wider_tolerance() -> None:
    """It magnifies rounding; the others are held to the table."""
    table = TOLERANCES["float32"]
    assert table.of_model("vim_tiny") == table.of_model("vmamba_tiny_s1l8") == table
    assert table.of_model("groupmamba_tiny").logits == 10 * table.logits
    assert table.of_model("groupmamba_tiny").margin == table.margin
