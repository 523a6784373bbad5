"""The experiment on real digits: its short version runs whole, and its parts do what they say."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
from benchmarks.experiment import __main__ as experiment
from benchmarks.experiment import data, probes, report, why, work
from benchmarks.experiment.cases import CASES, CLASSES, Case, quick_cases
from benchmarks.experiment.held import held_input
from benchmarks.experiment.statistics import mean, paired
from checkout import ROOT
from PIL import Image

import vssm
from vssm.models.cost import count
from vssm.ops import operators as ops

CHANCE = 100 / CLASSES


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    assert experiment.main(["-o", str(folder), "--quick"]) == 0
    return folder


@pytest.fixture(scope="module")
def found(output):
    return json.loads((output / report.NUMBERS).read_text())["cases"]


def _numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, float):
        yield value


def test_rows_are_complete_and_finite(found):
    assert [one["case"]["key"] for one in found] == [case.key for case in quick_cases()]
    for one, case in zip(found, quick_cases(), strict=True):
        assert all(math.isfinite(x) for x in _numbers(one["rows"]))
        assert all(math.isfinite(x) for x in _numbers(one["why"]))
        probed = {name: found["mean"] for name, found in one["probes"].items()}
        assert list(probed) == list(probes.CHANGES)
        dense = next(row for row in one["rows"] if row["key"] == "dense")
        assert probed["nothing changed"] == dense["top1"]["mean"]
        shown = {(row["table"], row["trained"], row["key"]) for row in one["rows"]}
        zero_shot = {key for table, _, key in shown if table == "zero-shot"}
        methods = {"dense", "evit", "none", "gap", "constant", "sum", "l1", "l2", "random", "held"}
        grid = {"masked", "none+grid", "gap+grid", "constant+grid", "held+grid"}
        assert zero_shot == methods | (grid if case.model == "vim_tiny" else set())
        for key in case.tuned:
            assert ("fine-tuned", key, "dense" if key == "further" else key) in shown
        assert {key for table, _, key in shown if "ratio" in table} == {"none@0.5", "gap@0.5"}
        answered = {(c["table"], c["question"]) for c in one["contrasts"]}
        assert {("zero-shot", "alignment"), ("fine-tuned", "alignment")} <= answered


def test_models_learn_far_more_than_chance(found):
    for one in found:
        top1 = {(row["trained"], row["key"]): row["top1"]["mean"] for row in one["rows"]}
        assert top1["dense", "dense"] > 3 * CHANCE
        assert top1["none", "none"] > 3 * CHANCE
        assert top1["gap", "gap"] > 3 * CHANCE


def test_flops_are_those_of_the_models(found):
    for one, case in zip(found, quick_cases(), strict=True):
        flops = {row["key"]: row["flops"] for row in one["rows"]}
        for key in ("dense", "none", "gap"):
            schedule = work.variants(case)[key].schedule
            model = vssm.create_model(
                case.model, schedule=schedule, num_classes=CLASSES, **case.options
            )
            counted = count(model)
            assert (flops[key]["published"], flops[key]["true"]) == (
                counted.published,
                counted.true,
            )
        assert flops["none"]["true"] < flops["gap"]["true"] < flops["dense"]["true"]


def test_a_run_that_goes_on_writes_the_same_bytes(output):
    names = (report.TABLES, report.NUMBERS, report.PLOT)
    before = {name: (output / name).read_bytes() for name in names}
    seed = output / "vim-digits" / "1"
    shutil.rmtree(seed / "gap")
    for place in (seed / "accuracy.json", seed / "why.json", *(output / name for name in names)):
        place.unlink()
    kept = (seed / "none" / "finetuned.safetensors").stat().st_mtime_ns
    assert experiment.main(["-o", str(output), "--quick"]) == 0
    assert {name: (output / name).read_bytes() for name in names} == before
    assert (seed / "none" / "finetuned.safetensors").stat().st_mtime_ns == kept


def test_an_unknown_case_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        experiment.main(["-o", str(tmp_path), "--only", "resnet"])
    assert "--only=resnet is none of vim-digits, " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_whole_cases_fit_their_models(case: Case):
    """Every variant of the long run has a model, and what is trained is among them."""
    known = work.variants(case)
    assert set(case.tuned) - {"further"} <= set(known)
    assert set(work.costs(case)) == set(known)
    assert case.seeds >= 5


def test_digits_are_split_once(tmp_path):
    one, two = (data.write(tmp_path / name) for name in "ab")
    files = sorted(p.relative_to(one).as_posix() for p in one.rglob("*.png"))
    assert files == sorted(p.relative_to(two).as_posix() for p in two.rglob("*.png"))
    assert len([f for f in files if f.startswith("train/")]) == 600
    assert len([f for f in files if f.startswith("held_out/")]) == 1197
    assert {f.split("/")[1] for f in files} == set("0123456789")
    for file in files[::100]:
        assert (one / file).read_bytes() == (two / file).read_bytes()
        image = Image.open(one / file)
        assert (image.size, image.mode) == ((36, 36), "RGB")
        assert np.asarray(image)[:2].max() == 0  # the margin
    stamp = (one / files[0]).stat().st_mtime_ns
    assert data.write(tmp_path / "a") == one
    assert (one / files[0]).stat().st_mtime_ns == stamp


def test_paired_differences_are_students():
    difference = paired([3.0, 5.0, 4.0, 6.0], [2.0, 3.0, 4.0, 3.0])
    assert difference.mean == pytest.approx(1.5)
    assert difference.error == pytest.approx(math.sqrt(5 / 3) / 2)
    reach = 3.182446305284263 * difference.error  # t, 3 degrees of freedom, 97.5 %
    assert difference.high == pytest.approx(1.5 + reach)
    assert difference.low == pytest.approx(1.5 - reach)
    assert not difference.is_significant
    assert paired([3.0, 3.1, 3.2], [1.0, 1.0, 1.0]).is_significant
    assert not paired([3.0, 3.0], [1.0, 1.0]).is_significant  # no spread, no interval
    assert mean([1.0, 3.0]).spread == pytest.approx(math.sqrt(2))


def test_held_input_is_a_step_that_is_as_long_as_its_gap():
    make = torch.Generator().manual_seed(0)
    u, dt = (torch.rand(2, 5, 2, 3, generator=make, dtype=torch.float64) for _ in range(2))
    B, C = (torch.randn(2, 5, 2, 4, generator=make, dtype=torch.float64) for _ in range(2))
    A = -torch.rand(2, 3, 4, generator=make, dtype=torch.float64)
    steps = torch.arange(5, dtype=torch.int32)
    order = torch.stack([steps, steps.flip(0)])[None]
    gap = torch.tensor([[[0, 1, 3, 2, 1], [0, 1, 2, 3, 1]]], dtype=torch.int32)
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    rest = {"D": zeros, "delta_bias": zeros, "delta_softplus": False}
    with held_input("held+grid"):
        found = ops.selective_scan(u, dt, A, B, C, order=order, gap=gap, **rest)
    by_token = torch.stack([gap[0, 0], gap[0, 1].flip(0)], dim=-1).clamp(min=1)
    longer = dt * by_token[None, :, :, None]
    wanted = ops.selective_scan(u, longer, A, B, C, order=order, gap=torch.ones_like(gap), **rest)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    with held_input("gap"):
        aligned = ops.selective_scan(u, dt, A, B, C, order=order, gap=gap, **rest)
    assert (aligned - wanted).abs().max() > 1e-3


def test_reach_is_that_of_the_recurrence():
    """One state that decays by a half each token: the weights at lags 0 to 3 are known."""
    ones = torch.ones(1, 4, 1, 1)
    call = {
        "u": ones, "delta": torch.full((1, 4, 1, 1), math.log(math.expm1(1.0))), "B": ones,
        "C": ones, "A": torch.full((1, 1, 1), -math.log(2)), "delta_bias": torch.zeros(1, 1),
        "order": torch.arange(4)[None, None],
    }  # fmt: skip
    weights = np.array([4, 3 / 2, 2 / 4, 1 / 8])
    lag, near = why._reach(call)
    assert lag == pytest.approx(float((weights * np.arange(4)).sum() / weights.sum()), rel=1e-5)
    assert near == pytest.approx(1)
    assert why._memory(call)["0.5"] == pytest.approx(1 / math.log(2), rel=1e-5)


def test_quick_cases_change_sizes_alone():
    for quick, case in zip(quick_cases(), CASES, strict=False):
        same = {f.name for f in fields(Case)} - {
            *("options", "schedule", "seeds", "tuned", "scratch", "further", "ratios")
        }
        assert all(getattr(quick, name) == getattr(case, name) for name in same)


def test_the_page_quotes_the_committed_run():
    """Each table of the page stands in the committed report, whose figures are the JSON's."""
    root = ROOT
    results = root / "benchmarks" / "results"
    whole = (results / "digits-2026-11.md").read_text().splitlines()
    quoted = [
        line
        for line in (root / "docs" / "experiment.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| ---")
    ]
    assert len(quoted) > 20
    assert [line for line in quoted if line not in whole] == []
    cases = json.loads((results / "digits-2026-11.json").read_text())["cases"]
    assert [one["case"]["key"] for one in cases] == [case.key for case in CASES]
    for one in cases:
        for row in one["rows"]:
            shown = f"{row['top1']['mean']:.2f} ± {row['top1']['spread']:.2f}"
            assert any(line.startswith(f"| {row['label']} |") and shown in line for line in whole)
            values = [
                100 * seed["right"][row["trained"]][row["key"]] / seed["images"]
                for seed in one["seeds"]
                if row["key"] != "random"
            ]
            assert not values or np.mean(values) == pytest.approx(row["top1"]["mean"])
