"""`vssm ablate`: variants, the EViT-style baseline, FLOPs and published figures, tables, plots."""

from __future__ import annotations

import csv
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exports import exported, images, micro, micro_plain
from PIL import Image
from plots import leave_plots_out
from safetensors.torch import save_file

import vssm
from vssm import MergeSchedule, PruneSchedule
from vssm.models import standard_config
from vssm.models.cost import count, merging_of_equal_cost
from vssm.models.family import Published
from vssm.models.fused_tokens import fuse_leftovers
from vssm.models.schedules import default_schedules
from vssm.studies.measure import Outcome, prepare
from vssm.studies.plan import Run, make_plan, published
from vssm.studies.plot import _STYLES, _kind
from vssm.studies.report import AblationReport, Measured, Setting, amount, make_row
from vssm.studies.tables import probability, rule_cells, tables

PLAIN = {"alignment": "none"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """21 images in 7 folders, and one file that is none."""
    root = tmp_path_factory.mktemp("pictures")
    make = np.random.default_rng(0)
    for i in range(21):
        folder = root / f"n{i % 7}"
        folder.mkdir(exist_ok=True)
        pixels = make.integers(0, 256, (60, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    (root / "n3" / "notes.txt").write_text("no image")
    return root


@pytest.mark.parametrize(
    ("name", "variant", "printed", "figure"),
    [
        ("vim_tiny", "merge", 1.28, "published"),
        ("vim_small", "merge", 3.58, "published"),
        ("vim_tiny", "dense", 1.45, "published"),
        ("vim_tiny", "gap", 1.29, "published"),
        ("vim_small", "dense", 5.08, "published"),
        ("vim_small", "gap", 3.60, "published"),
        ("plain_mamba_l3", "dense", 14.4, "published"),
        ("plain_mamba_l3", "gap", 8.44, "unaligned"),
    ],
)
def test_flops_column_reproduces_the_published(name, variant, printed, figure):
    """Within 0.5 %; PlainMamba's pruned figure is the one without alignment's part."""
    schedule = PruneSchedule.parse(default_schedules()[name])
    with torch.device("meta"):
        dense = vssm.create_model(name)
    merging = merging_of_equal_cost(dense, schedule) if "vim" in name else None
    plan = make_plan(schedule, seeds=1, ratios=[], merging=merging)
    chosen = next(v for v in plan.variants if v.key == variant)
    with torch.device("meta"):
        model = vssm.create_model(name, schedule=chosen.schedule)
    cost = prepare(chosen, model, backend="auto", device="meta")[1]
    assert getattr(cost, figure) / 1e9 == pytest.approx(printed, rel=5e-3)
    beside = published(name, variant, chosen.schedule)
    assert beside.gflops == printed
    run = Run(variant, chosen, False, 0)
    measured = Measured([run], {variant: Outcome("10", [(2, 1.0, True)])}, {variant: cost})
    line = next(line for line in plan.lines if line.keys == (variant,))
    row = make_row(line, measured, tuned=False, weights="", published=beside)
    report = AblationReport(Setting(name, (224, 224), 7_148_008, 2, "a CPU"), {}, (row,), {}, ())
    found = tables(report)[0]
    shown = dict(zip(found.columns, found.rows[0], strict=True))
    assert (shown["params"], shown["published FLOPs"]) == ("7.15 M", f"{printed:g} G")
    by_rule = rule_cells(row)[1 if figure == "published" else 2]
    assert by_rule.endswith(" G")
    assert float(by_rule[:-2]) == pytest.approx(printed, rel=6e-3)  # of three digits


@pytest.mark.parametrize("name", ["vim_small", "plain_mamba_l1"])
def test_without_alignments_part_is_plain_removal(name):
    schedule = PruneSchedule.parse(default_schedules()[name])
    costs = {}
    for variant in make_plan(schedule, seeds=1, ratios=[]).variants:
        if variant.key in {"gap", "none"}:
            with torch.device("meta"):
                model = vssm.create_model(name, schedule=variant.schedule)
            costs[variant.key] = prepare(variant, model, backend="auto", device="meta")[1]
    assert costs["gap"].unaligned == costs["none"].published == costs["none"].unaligned
    assert costs["gap"].published > costs["gap"].unaligned


def test_published_figures_stand_beside_their_own_schedule_alone():
    paper = PruneSchedule({5: 0.8, 10: 0.8, 15: 0.8})
    other = PruneSchedule({5: 0.7})
    assert published("vim_small", "none", paper) == Published(None, 75.4)
    assert published("vim_small", "none", other) == Published(None, None)
    assert published("vim_small", "dense", other) == Published(5.08, 80.5)
    assert published("vim_base", "gap", paper) == Published(None, None)
    assert published("vim_base", "merge", MergeSchedule(11)) == Published(13.21, 81.3)
    assert published("vim_tiny", "merge", MergeSchedule(4)) == Published(None, None)
    assert published("vim_tiny", "merge+size", MergeSchedule(5, alignment="size")) == Published(
        None, None
    )
    assert standard_config("vim_tiny")["depth"] == 24


def test_merging_of_equal_cost_is_the_published():
    """The published schedules of both methods were made to cost the same."""
    for name, r in (("vim_tiny", 5), ("vim_small", 11)):
        with torch.device("meta"):
            dense = vssm.create_model(name)
        schedule = PruneSchedule.parse(default_schedules()[name])
        assert merging_of_equal_cost(dense, schedule) == MergeSchedule(r)
        assert dense.schedule is None  # left as it was
        assert not dense.stages
    small = micro(None, depth=2)
    found = merging_of_equal_cost(small, PruneSchedule({1: 0.5}))
    works = [count(micro(MergeSchedule(r, start=1), depth=2)).true for r in (found.r - 1, found.r)]
    wanted = count(micro("1:0.5", depth=2)).true
    assert found.start == 1
    assert abs(works[1] - wanted) <= abs(works[0] - wanted)


@pytest.mark.parametrize(
    ("own", "other", "label"),
    [("compact", "position", "by position"), ("position", "compact", "along the list")],
)
def test_plan_has_the_other_convolution(own, other, label):
    schedule = PruneSchedule({1: "0.7"}, conv=own)
    plan = make_plan(schedule, seeds=1, ratios=[], other_conv=True)
    found = {v.key: v.schedule for v in plan.variants if v.key.endswith(f"+{other}")}
    assert [(key, s.alignment, s.conv) for key, s in found.items()] == [
        (f"none+{other}", "none", other),
        (f"gap+{other}", "gap", other),
    ]
    assert {v.schedule.conv for v in plan.variants if v.schedule and v.key not in found} == {own}
    assert [line.label for line in plan.lines if line.table == "convolution"] == [
        f"plain removal, {label}",
        f"aligned (gap), {label}",
    ]
    assert {v.baseline for v in plan.variants if v.key in found} == {"none"}


def test_plan():
    schedule = PruneSchedule({1: "0.7", 2: "0.8"}, alignment="constant", importance="l2")
    plan = make_plan(schedule, seeds=2, ratios=["0.5", "0.9"])
    found = {v.key: v.schedule for v in plan.variants}
    assert list(found) == [
        *("dense", "evit", "gap", "constant", "none", "masked", "sum", "l1", "l2"),
        *("random-0", "random-1", "none@0.5", "gap@0.5", "none@0.9", "gap@0.9"),
    ]
    assert found["dense"] is None
    assert {found[k].importance for k in ("evit", "gap", "constant", "none", "masked")} == {"clip"}
    assert [found[k].alignment for k in ("evit", "sum", "random-1")] == ["none", "gap", "gap"]
    assert [found[f"random-{s}"].seed for s in (0, 1)] == [0, 1]
    later = make_plan(schedule, seeds=2, ratios=[], seed=5)
    drawn = {v.key: v.schedule.seed for v in later.variants if v.key.startswith("random")}
    assert drawn == {"random-5": 5, "random-6": 6}
    assert [str(r) for r in found["none@0.5"].ratios.values()] == ["0.5", "0.5"]
    assert {key for line in plan.lines for key in line.keys} == set(found)
    merging = make_plan(schedule, seeds=1, ratios=[], merging=MergeSchedule(3))
    merged = {v.key: v.schedule for v in merging.variants if v.key not in found}
    assert merged == {"merge": MergeSchedule(3), "merge+size": MergeSchedule(3, alignment="size")}
    assert {v.baseline for v in merging.variants if v.key in merged} == {"none"}
    assert [line.keys[0] for line in merging.lines if line.table == "methods"][-2:] == [*merged]
    with pytest.raises(ValueError, match=r"ratio=2 after block 1 is outside"):
        make_plan(schedule, seeds=1, ratios=["2"])


@pytest.mark.parametrize("make", [micro, micro_plain])
def test_fused_leftovers_by_hand(make):
    """One stage: the weakest kept token holds the score-weighted mean, the others stay."""
    model = fuse_leftovers(make("1:0.6", rules=PLAIN)).double()
    (stage,) = model.stages.values()
    seen = {}
    fused = model.pruner

    def record(stage, tokens, score, streams, **options):
        seen["in"], seen["score"] = [x.clone() for x in streams], score
        seen["out"] = fused(stage, tokens, score, streams, **options)
        return seen["out"]

    vars(model)["pruner"] = record
    found = model.forward_details(torch.from_numpy(images(model)).double())
    plain = make("1:0.6", rules=PLAIN).double()
    same = plain.forward_details(torch.from_numpy(images(model)).double())
    assert torch.equal(found.kept_positions[0], same.kept_positions[0])
    assert not torch.allclose(found.logits, same.logits, rtol=1e-6)
    cls = stage.layout.cls_index
    for image, kept in enumerate(found.kept_positions[0].tolist()):
        score = seen["score"][image]
        weakest = min((p for p in kept if p != cls), key=lambda p: float(score[p]))
        gone = [p for p in range(stage.seqlen) if p not in kept]
        members = [*gone, weakest]
        for before, after in zip(seen["in"], seen["out"][1], strict=True):
            weight = score[members] / score[members].sum()
            wanted = before[image, kept].clone()
            wanted[kept.index(weakest)] = (weight[:, None] * before[image, members]).sum(0)
            torch.testing.assert_close(after[image], wanted, rtol=1e-12, atol=1e-12)


def test_fused_leftovers_with_scores_of_zero():
    """No weights to go by: the leftovers count alike."""
    model = fuse_leftovers(micro("1:0.6", rules=PLAIN))
    fused, seen = model.pruner, []

    def without_scores(stage, tokens, score, streams, **options):
        result = fused(stage, tokens, torch.zeros_like(score), streams, **options)
        seen.extend(result[1])
        return result

    vars(model)["pruner"] = without_scores
    with torch.no_grad():
        model(torch.from_numpy(images(model)))
    assert all(x.isfinite().all() for x in seen)


def test_fused_leftovers_refuse():
    with pytest.raises(ValueError, match=r"a baseline of plain removal"):
        fuse_leftovers(micro())
    with pytest.raises(ValueError, match=r"importance='sum' has scores that are no weights"):
        fuse_leftovers(micro(rules={**PLAIN, "importance": "sum"}))
    with pytest.raises(ValueError, match=r"block=1 keeps the class token alone"):
        fuse_leftovers(micro("1:0.01", rules=PLAIN))


def test_throughput_leaves_the_first_batch_out():
    times = [(8, 9.0, True), (8, 2.0, False), (8, 7.0, True), (8, 4.0, False), (4, 0.1, False)]
    outcome = Outcome("1000" * 9, times)
    assert outcome.images_per_s() == pytest.approx(8 / 3)
    assert len(outcome.seconds_per_image()) == 2
    assert (outcome.images, outcome.top1) == (36, 0.25)
    assert Outcome("1" * 8, [(8, 2.0, True)]).images_per_s() == 4.0


def test_command(cli, tmp_path, pictures):
    """Top-1 of every variant is what `vssm evaluate` finds; the unreadable file is counted."""
    artifact = exported(tmp_path, micro())
    tuned = tmp_path / "tuned.safetensors"
    state = micro().state_dict()
    state["head.bias"] = torch.full_like(state["head.bias"], -50.0)
    state["head.bias"][2] = 50.0
    save_file(state, tuned)
    out = tmp_path / "ablation"
    options = ("--seeds=2", "--ratios=0.5", "--batch=4", f"--finetuned=gap={tuned}")
    assert cli("ablate", artifact.directory, pictures, "-o", out, *options) == 0, cli.out
    report = json.loads((out / "ablation.json").read_text())
    rows = {(r["table"], r["label"]): r for r in report["rows"]}
    for label, schedule in (("dense", None), ("aligned (gap)", "1:0.7,2:0.8")):
        one = exported(tmp_path / label, micro(schedule))
        found = vssm.evaluate(one, pictures, "torch", batch=4, workers=0)
        assert rows["methods", label]["top1"] == found.top1
    assert rows["methods", "aligned (gap), fine-tuned"]["top1"] == 3 / 21
    random = rows["importance", "random, 2 seeds"]
    assert random["variants"] == ["random-0", "random-1"]
    assert random["spread"] is not None
    assert len(rows) == 6 + 4 + 5 + 2 + 2 + 3  # three tables show the fine-tuned gap
    assert report["left_out"] == {}
    assert "beside plain removal: vim_tiny, 48 x 48 pixels" in cli.out
    assert "FLOPs by rule" in cli.out
    assert "published top-1 %" not in cli.out  # of a model of this size nothing is published
    assert [path for path, _ in report["unreadable"]] == ["n3/notes.txt"]
    text = (out / "ablation.md").read_text()
    assert text.count("\n## ") == 8
    assert "| EViT-style, one fused leftover |" in text
    for name in ("accuracy_flops", "accuracy_time"):
        assert f"]({name}.png)" in text
        with Image.open(out / f"{name}.png") as png:
            assert np.asarray(png.convert("L")).std() > 5
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        svg = (out / f"{name}.svg").read_text()
        assert svg[svg.index("<svg") :] in (out / "ablation.html").read_text()
    _published_as_shown(report, out)


def _published_as_shown(report, out):
    """The other forms have the numbers of the report, and what ran in every caption."""
    rows = list(csv.DictReader((out / "ablation.csv").read_text().splitlines()))
    assert [row["variant"] for row in rows] == [row["label"] for row in report["rows"]]
    for row, found in zip(rows, report["rows"], strict=True):
        assert float(row["top1"]) == found["top1"]
        assert float(row["reduction"]) == pytest.approx(
            1 - found["flops"]["published"] / report["rows"][0]["flops"]["published"]
        )
    assert float(rows[0]["speed_up"]) == 1.0
    labels = [row["variant"] for row in rows]
    plain, gap = labels.index("plain removal"), labels.index("aligned (gap)")
    assert (rows[plain]["better"], rows[plain]["p"]) == ("", "")
    (pair,) = report["rows"][gap]["paired"]["pairs"]
    assert [rows[gap][k] for k in ("better", "worse", "p")] == [
        str(pair[k]) for k in ("better", "worse", "p")
    ]
    tex, caption = (out / "ablation.tex").read_text(), report["setting"]["ran"]
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == tex.count(r"\end{table}") == 7
    assert re.search(r"1 thread, float32, torch .*, backend auto, batch 4$", caption)
    assert tex.count(caption.replace("_", r"\_").replace("%", r"\%")) == 7
    body = [line for line in tex.splitlines() if line.endswith(r"\\")]
    columns = [line.count("&") for line in tex.splitlines() if line.startswith("variant &")]
    assert {line.count("&") for line in body} == set(columns)
    assert (out / "ablation.md").read_text().count(caption) == 8  # of the facts, and each table


def test_every_variant_has_a_mark_and_a_colour_of_its_own():
    plan = make_plan(
        PruneSchedule({1: 0.7}),
        seeds=2,
        ratios=["0.5", "0.9"],
        other_conv=True,
        merging=MergeSchedule(),
    )
    kinds = {_kind(SimpleNamespace(variants=line.keys)): line.table for line in plan.lines}
    assert set(kinds) == set(_STYLES)
    for styles in zip(*_STYLES.values(), strict=True):
        assert len(set(styles)) == len(_STYLES)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (999_700, "1 M"), (1_449_000_000, "1.45 G"), (25_796_584, "25.8 M")],
)
def test_amounts(number, text):
    assert amount(number) == text


def test_probabilities():
    assert [probability(p) for p in (1.0, 0.04567, 0.00099)] == ["1.000", "0.046", "< 0.001"]


def test_what_a_family_lacks_is_left_out_by_name(cli, tmp_path, pictures, monkeypatch):
    leave_plots_out(monkeypatch)
    artifact = exported(tmp_path, micro_plain())
    out = tmp_path / "ablation"
    end = ("--seeds=1", "--ratios=0.5", "--json", tmp_path / "report.json")
    assert cli("ablate", artifact.directory, pictures, "-o", out, *end) == 0, cli.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["left_out"]) == ["merge", "merge+size", "masked"]
    assert (
        "left out: merge: schedule='5 merged after every 2 blocks from block 2': Plain" in cli.out
    )
    assert "left out: masked: alignment='masked' is how Vim was trained" in cli.out
    assert not any("masked" in row["variants"] for row in report["rows"])
    assert {row["published"]["top1"] for row in report["rows"]} == {None}


def test_refusals(cli, tmp_path, pictures):
    artifact = exported(tmp_path, micro(None))
    pruned = exported(tmp_path / "pruned", micro())
    cases = {
        "has no schedule to ablate": (artifact, ()),
        "finetuned='gup' is not a variant": (pruned, ("--finetuned=gup=x.safetensors",)),
        "is not VARIANT=FILE": (pruned, ("--finetuned=gap",)),
        "batch=0 is below 1": (pruned, ("--batch=0",)),
        "seeds=0 is below 1": (pruned, ("--seeds=0",)),
        "ratios=0.8 is named twice": (pruned, ("--ratios=0.8,0.5,0.80",)),
        "ratio=1.2 is outside (0, 1]": (pruned, ("--ratios=0.8,1.2",)),
        "ratio='' is not a number": (pruned, ("--ratios=0.8,",)),
        "x.safetensors is named twice; several files of a variant are": (
            pruned,
            ("--finetuned=gap=x.safetensors", "--finetuned=gap=./x.safetensors"),
        ),
        "seeds=9999999999 is above 1000": (pruned, ("--seeds=9999999999",)),
        "workers=-1 is below 0": (pruned, ("--workers=-1",)),
        "workers=9999999999 is above 1024": (pruned, ("--workers=9999999999",)),
        "device='tpu' is not one of": (pruned, ("--device=tpu",)),
        "backend='fast' is not one of": (pruned, ("--backend=fast",)),
    }
    for message, (export, options) in cases.items():
        assert cli("ablate", export.directory, pictures, "-o", tmp_path / "out", *options) == 2
        assert message in cli.out
    taken = pruned.directory / "model.json"
    assert cli("ablate", pruned.directory, pictures, "-o", taken) == 2
    assert f"output={taken} cannot be made (File exists); name another directory" in cli.out
