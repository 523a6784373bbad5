"""Work counted in a file: the same as counted in the model that it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
from compat_cases import exported_style
from exports import exported, micro, micro_plain

import vssm
from vssm.bench.kinds import Work, _at_batch_one, by_kind, count_graph
from vssm.bench.measure import MachineRates
from vssm.errors import UnsupportedError
from vssm.models.base import VisionModel
from vssm.models.cost import count


@pytest.mark.parametrize(
    "model", [micro(None), micro(), micro_plain(None)], ids=["vim", "vim pruned", "plain mamba"]
)
def test_graph_and_model_agree(model: VisionModel, tmp_path: Path) -> None:
    work = count(model)
    found = count_graph(exported(tmp_path, model).model_path)
    assert (found.exps, found.macs, found.products) == (work.exps, work.gemm, 0)


def test_linear_layers_of_a_module(tmp_path: Path) -> None:
    work = count_graph(exported_style(tmp_path, "slow path").model_path)
    assert (work.exps, work.products, work.conv) == (9 * 24 * 4, 0, 0)
    linear = 9 * (12 * 48 + 24 * (2 + 8) + 2 * 24 + 24 * 12)
    assert (work.gemm, work.taps) == (linear, 9 * 24 * 4)  # a convolution of four taps


def test_one_decay_for_all_states(tmp_path: Path) -> None:
    work = count_graph(exported_style(tmp_path, "mamba-2").model_path)
    assert (work.exps, work.products) == (9 * 24, 3 * 9 * 24 * 5)


def test_time_by_kind_of_work(tmp_path: Path) -> None:
    path, notes = exported(tmp_path, micro(None)).model_path, list[str]()
    work = count_graph(path)
    rates = MachineRates(exp2=1e6, products=2e6, macs={1: 4e6})
    spent = {"MatMul": 2.0, "Gemm": 1.0, "GatedSelectiveScan": 4.0, "Conv": 0.5, "TokenConv": 0.25}
    found = {k.kind: k for k in by_kind(spent | {"Split": 0.125, "Add": 8.0}, path, rates, notes)}
    times = {kind: row.ms for kind, row in found.items()}
    expected = {"matrix products": 3, "scans": 4, "convolutions": 0.75, "moving data": 0.125}
    assert times == expected | {"rest": 8}
    assert found["matrix products"].floor_ms == pytest.approx(work.gemm / 4e3)
    assert found["scans"].floor_ms == pytest.approx(work.exps / 1e3)
    assert found["convolutions"].floor_ms == pytest.approx(work.conv / 4e3 + work.taps / 2e3)
    assert (found["moving data"].floor_ms, found["rest"].floor_ms, notes) == (None, None, [])
    assert work == Work(work.exps, work.gemm, 0, work.conv, work.taps)
    assert min(work.gemm, work.conv, work.taps) > 0


def test_sizes_at_batch_one() -> None:
    assert [_at_batch_one(s) for s in ("", "batch", "9*batch", "s77*3*2")] == [1, 1, 9, 6]
    with pytest.raises(UnsupportedError, match="not a multiple of the batch"):
        _at_batch_one("batch + 1")


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("quick_rates")
def test_bench_of_a_module(tmp_path: Path) -> None:
    artifact = exported_style(tmp_path, "vim v2")
    report = vssm.bench_directory(artifact.directory, batches=(1,), samples=2)
    assert {row.subject for row in report.rows} == {"ort kernel", "ort body"}


@pytest.mark.usefixtures("quick_rates")
def test_other_exports_in_the_same_run(tmp_path: Path) -> None:
    pruned = exported(tmp_path / "pruned", micro())
    half = exported(tmp_path / "half", micro(None), dtype="float16")
    report = vssm.bench_directory(
        pruned.directory, batches=(1,), samples=1, torch_loop=False, beside=[half.directory]
    )
    name = f"ort kernel, {half.directory.name}"
    assert [row.subject for row in report.rows] == ["ort kernel", "ort body", name]
    assert report.context["command"].endswith(f" --beside {half.directory}")
    work = count(micro(None))
    assert report.row(name).floor_ms > report.row("ort kernel").floor_ms, "each has its own work"
    assert work.exps > count(micro()).exps
    with pytest.raises(ValueError, match="two have one last part"):
        vssm.bench_directory(pruned.directory, beside=[half.directory, half.directory])
    with pytest.raises(ValueError, match="an engine is measured beside its export"):
        vssm.bench_directory(pruned.directory, runtime="tensorrt", beside=[half.directory])
    other = exported(tmp_path / "other", micro(None, image_size=64, depth=1))
    with pytest.raises(ValueError, match="measure exports of one image size together"):
        vssm.bench_directory(pruned.directory, beside=[other.directory])
