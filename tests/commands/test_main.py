"""The command line: exit codes, messages, files; every bad input ends in code 2 and no file."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from command import MODEL, SHALLOW, Run
from exports import exported, micro, shared_traces
from PIL import Image

from vssm.checkpoints.load import save_safetensors
from vssm.commands.main import app


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "micro.safetensors"
    save_safetensors(micro(None).state_dict(), path)
    return path


@pytest.mark.usefixtures("quick_rates")
@shared_traces()
def test_export_check_run_bench(cli: Run, tmp_path: Path, checkpoint: Path, picture: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--checkpoint", checkpoint, "--schedule", "1:0.7,2:0.8", "-o", out)
    assert cli("export", *MODEL, *arguments) == 0, cli.out
    assert "micro.safetensors (safetensors)" in cli.out
    assert "tokens kept by stage: [27, 21]" in cli.out

    assert cli("check", out, "--per-block", "--json", tmp_path / "check.json") == 0, cli.out
    assert "backend: kernel" in cli.out
    assert "passed" in cli.out
    for file in (tmp_path / "check.json", out / "parity.json"):
        assert json.loads(file.read_text())["failures"] == []
    assert cli("check", out, "--backend=body", "--image", picture) == 0, cli.out

    assert cli("run", out, picture, "--top=3", "--json", tmp_path / "run.json") == 0, cli.out
    (result,) = json.loads((tmp_path / "run.json").read_text())["images"]
    best = [p["probability"] for p in result["predictions"]]
    assert len(best) == 3
    assert best == sorted(best, reverse=True)

    assert cli("bench", out, "--batch=1,2", "--samples=2", "--threads=1,2") == 0, cli.out
    report = json.loads((out / "bench.json").read_text())
    subjects = {"ort kernel", "ort body", "torch loop", "ort kernel, dense"}
    assert {r["subject"] for r in report["rows"]} == subjects
    assert {(r["batch"], r["threads"]) for r in report["rows"]} == {(1, 1), (2, 1), (1, 2), (2, 2)}
    page = (out / "bench.html").read_text()
    assert "<svg" in page
    assert "ort kernel, dense" in page
    assert cli("check", out) == 0, "reports beside the export do not spoil it"


@shared_traces()
def test_rules_reach_the_export(cli: Run, tmp_path: Path) -> None:
    rules = {"alignment": "constant", "importance": "l1", "conv": "position"}
    given = [f"--{name}={value}" for name, value in rules.items()]
    out = tmp_path / "out"
    assert cli("export", *MODEL, "--schedule=1:0.7", *given, "-o", out) == 0, cli.out
    schedule = json.loads((out / "model.json").read_text())["schedule"]
    assert {name: schedule[name] for name in rules} == rules


@shared_traces()
def test_seeded_weights_are_said(cli: Run, tmp_path: Path) -> None:
    assert cli("export", *SHALLOW, "-o", tmp_path / "out", "--no-weights") == 0
    assert "seeded initial weights" in cli.out
    assert cli("check", tmp_path / "out") == 2
    assert "--no-weights" in cli.out


def test_a_failed_check_is_exit_code_1(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vssm.parity import compare as parity

    exported(tmp_path, micro())
    strict = parity.Tolerance(logits=1e-12, block=1e-12, margin=0.0)
    monkeypatch.setattr(parity, "TOLERANCES", {"float32": strict})
    assert cli("check", tmp_path / "out") == 1
    assert "failed: logits: error" in cli.out
    assert json.loads((tmp_path / "out/parity.json").read_text())["failures"]


def test_models_and_doctor(cli: Run, tmp_path: Path) -> None:
    assert cli("models", "--json", tmp_path / "models.json") == 0
    rows = {r["name"]: r for r in json.loads((tmp_path / "models.json").read_text())}
    assert rows["vim_tiny"]["parameters"] == 7_148_008
    assert rows["vim_base"]["parameters"] == 97_598_440
    assert rows["vim_small_stride8"]["tokens"] == 730
    assert rows["vim_tiny"]["stage_tokens"] == [197]
    assert rows["vmamba_tiny_s1l8"]["stage_tokens"] == [3136, 784, 196, 49]
    address = "hf://hustvl/Vim-tiny-midclstok/vim_t_midclstok_76p1acc.pth"
    assert rows["vim_tiny"]["checkpoint"]["address"] == address
    assert address in cli.out
    assert cli("doctor", "--json", tmp_path / "doctor.json") == 0
    findings = {f["part"]: f for f in json.loads((tmp_path / "doctor.json").read_text())}
    assert findings["operator library (ONNX Runtime)"]["found"]
    assert findings["onnxruntime"]["found"]
    assert all(f["remedy"] for f in findings.values() if not f["found"])


def labels_file(path: Path) -> Path:
    path.write_text("one\ntwo\n")
    return path


BAD_EXPORTS: list[tuple[list[str], str]] = [
    ([*MODEL, "--alignment=none"], "alignment='none' without a schedule"),
    ([*MODEL, "--importance=l1"], "importance='l1' without a schedule"),
    ([*MODEL, "--conv=position"], "conv='position' without a schedule"),
    ([*MODEL, "--schedule=1:0.8", "--conv=wide"], "conv='wide' is not one of"),
    ([*MODEL, "--ema"], "weights='ema' without a checkpoint"),
    ([*MODEL, "--set=num_classes=5"], "--num-classes N"),
    ([*MODEL, "--set=depth=abc"], "depth='abc' is not of type int"),
    ([*MODEL, "--set=depth=2.5"], "depth=2.5 is not of type int"),
    ([*MODEL, "--set=rope=no"], "rope='no' is not of type bool"),
    ([*MODEL, "--set=divide_out=False"], "divide_out='False' is not of type bool"),
    ([*MODEL, "--set=depth=true"], "depth=True is not of type int"),
    ([*MODEL, "--set=layer_scale=abc"], "layer_scale='abc' is not of type"),
    ([*MODEL, "--set=image_size=[48,48.5]"], "image_size=[48, 48.5] holds a fraction"),
    ([*MODEL, "--set=image_size=99999"], "image_size=99999 is not a number up to 4,096"),
    ([*MODEL, "--set=d_state=99999999"], "d_state=99999999 is not a number up to 16,777,216"),
    ([*MODEL, "--set=norm_eps=NaN"], "norm_eps=nan is not a number up to"),
    ([*MODEL, "--set=layer_scale=1e999"], "layer_scale=inf is not a number up to"),
    ([*MODEL, "--num-classes=9223372036854775808"], "num_classes=9223372036854775808 is not a"),
    ([*MODEL, "--set=image_size=48.5"], "image_size=48.5 is not of type int or tuple or list"),
    (["vim_huge"], "name='vim_huge' is not a model"),
    (["vmamba_tiny_s1l8", "--schedule", "1:0.8"], "VMamba is hierarchical"),
    ([*MODEL, "--schedule=1:1.5"], "outside (0, 1]"),
    ([*MODEL, "--schedule=1:0"], "outside (0, 1]"),
    ([*MODEL, "--schedule=1:x"], "is not a number"),
    ([*MODEL, "--schedule=9:0.8"], "block=9 of the schedule is outside the model's blocks 1 to 3"),
    ([*MODEL, "--schedule=0:0.8"], "block=0 is not an integer from 1"),
    ([*MODEL, "--schedule="], "--schedule= is empty; give a value (perhaps a variable of your"),
    ([*MODEL, "--labels", ""], "the argument behind --labels is empty; give a value"),
    ([*MODEL, "--schedule=defaults"], "is neither BLOCK:RATIO pairs nor 'default'"),
    (["exports/out"], "name='exports/out' is a path, but this takes the name of a model"),
    ([*MODEL, "--schedule=1:0.8,1:0.7"], "block 1 is named twice"),
    ([*MODEL, "--schedule=1:0.8", "--alignment=foo"], "alignment='foo' is not one of"),
    ([*MODEL, "--schedule=1:0.8", "--alignment=masked"], "alignment='masked'"),
    ([*MODEL, "--schedule=1:0.8", "--importance=as_released"], "alignment='none'"),
    ([*MODEL, "--dtype=int8"], "dtype='int8'"),
    ([*MODEL, "--opset=17"], "opset=17"),
    ([*MODEL, "--set=colour=3"], "has no such option"),
    ([*MODEL, "--set=depth"], "is not KEY=VALUE"),
    ([*MODEL, "--set=eps=1" + 400 * "0"], "00... is an integer of 401 digits; give one of 18"),
    ([*MODEL, "--set=depth=0"], "depth=0 is below 1"),
    ([*MODEL, "--checkpoint=nowhere.pth"], "nowhere.pth"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_EXPORTS, ids=lambda v: str(v)[-40:])
def test_bad_exports(cli: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    assert cli("export", *arguments, "-o", tmp_path / "out") == 2
    assert message in cli.out
    assert list(tmp_path.iterdir()) == []


def _truncated(path: Path, good: Path) -> None:
    path.write_bytes(good.read_bytes()[:-100])


def _foreign(path: Path, good: Path) -> None:
    Image.new("RGB", (4, 4)).save(path, format="JPEG")


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil_was_here"),))


def _code(path: Path, good: Path) -> None:
    path.write_bytes(pickle.dumps({"model": _Evil()}))


def _missing(path: Path, good: Path) -> None:
    state = micro(None).state_dict()
    del state["layers.1.mixer.D"]
    torch.save({"model": state}, path)


def _unexpected(path: Path, good: Path) -> None:
    torch.save({"model": {**micro(None).state_dict(), "extra.weight": torch.ones(1)}}, path)


def _misshapen(path: Path, good: Path) -> None:
    torch.save({"model": {**micro(None).state_dict(), "head.bias": torch.ones(9)}}, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncated, "bad."),
        (_foreign, "bad."),
        (_code, "bad."),
        (_missing, "layers.1.mixer.D"),
        (_unexpected, "extra.weight"),
        (_misshapen, "head.bias"),
    ],
)
def test_bad_checkpoints(
    cli: Run,
    tmp_path: Path,
    checkpoint: Path,
    spoil: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    suffix = "safetensors" if spoil is _truncated else "pth"
    bad = tmp_path / f"bad.{suffix}"
    spoil(bad, checkpoint)
    assert cli("export", *MODEL, "--checkpoint", bad, "-o", tmp_path / "out") == 2
    assert message in cli.out
    assert "Traceback" not in cli.out
    assert list(tmp_path.iterdir()) == [bad]


@shared_traces()
def test_bad_outputs(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert cli("export", *MODEL, "-o", file) == 2
    assert "is not a directory" in cli.out
    assert cli("export", *MODEL, "-o", file / "below") == 2
    assert file.read_text() == "mine"
    exported(tmp_path, micro())
    assert cli("export", *SHALLOW, "-o", tmp_path / "out") == 2
    assert "--force" in cli.out
    assert cli("export", *SHALLOW, "-o", tmp_path / "out", "--force") == 0


def test_bad_artifacts_and_images(cli: Run, tmp_path: Path, picture: Path) -> None:
    out = exported(tmp_path, micro()).directory
    text = tmp_path / "text.png"
    text.write_text("no image")
    assert cli("run", out, text) == 2
    assert "text.png" in cli.out
    assert cli("run", out, tmp_path / "absent.png") == 2
    assert cli("run", out, picture, "--labels", labels_file(tmp_path / "labels.txt")) == 2
    assert "names 2 classes" in cli.out
    assert cli("run", out, picture, "--top=0") == 2
    assert cli("bench", out, "--batch=1,x") == 2
    assert cli("bench", out, "--batch=0", "--no-torch") == 2
    assert cli("check", out, "--runtime=cuda") == 2
    with (out / "model.onnx").open("ab") as file:
        file.write(b"\0")
    for command in ("check", "bench"):
        assert cli(command, out) == 2
        assert "model.onnx" in cli.out
    assert cli("run", out, picture) == 2
    (out / "model.json").write_text('{"format_version": 1}')
    assert cli("check", out) == 2
    assert "model.json" in cli.out


def test_usage_errors_are_exit_code_2_and_help_is_0(cli: Run) -> None:
    assert cli("export") == 2
    assert cli("unknown") == 2
    assert cli("--help") == 0
    assert "export" in cli.out
    assert cli("--version") == 0


def test_every_option_is_explained_and_every_result_can_be_json() -> None:
    for name, command in typer.main.get_command(app).commands.items():
        parameters = {p.name: p for p in command.params}
        assert "json_file" in parameters, name
        assert all(p.help for p in command.params), name


def test_every_command_that_computes_has_threads() -> None:
    commands = typer.main.get_command(app).commands
    names = ["ablate", "bench", "check", "evaluate", "finetune", "predict", "quantize", "run"]
    for name in [*names, "visualize"]:
        assert "threads" in {p.name for p in commands[name].params}, name


def test_the_installed_command() -> None:
    command = [sys.executable, "-m", "vssm.commands.main", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("vssm 0.")
