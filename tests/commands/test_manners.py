"""What the commands do for people: narrow terminals, damaged images, `-h`, completion, progress."""

from __future__ import annotations

import copy
import inspect
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from command import Run
from exports import exported, micro
from rich.console import Console

import vssm
from vssm.commands import tables
from vssm.commands.main import app
from vssm.errors import reason
from vssm.models.registry import cards
from vssm.runtimes import session

pytestmark = pytest.mark.usefixtures("_dark")


@pytest.fixture
def _dark(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colours, wherever the tests run."""
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro Vim of seven classes."""
    return exported(tmp_path_factory.mktemp("manners"), micro()).directory


@pytest.mark.parametrize("width", [80, 60, 40])
def test_no_name_is_split_on_a_narrow_terminal(
    cli: Run, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(tables.console, "width", width)
    assert cli("models") == 0
    words = cli.out.split()
    assert [name for name in cards() if name not in words] == []
    assert cli("doctor") == 0
    assert {"tensorrt-rtx-cu13", "onnxruntime", "torch"} <= set(cli.out.split())


def test_classifiers_are_a_table_in_80_columns(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables.console, "width", 80)
    assert cli("models") == 0
    lines = cli.raw.splitlines()
    (vim,) = (line for line in lines if "vim_tiny " in line)
    assert "7,148,008" in vim
    assert max(len(line) for line in lines if line[:1] in "┃│┏└┡") <= 80


def test_a_table_is_never_wider_than_its_terminal(
    cli: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = io.StringIO()
    console = Console(file=file, width=80)
    rows = [("a_name_of_thirty_four_characters__", "some words that may wrap " * 3, 1.5, None)]
    columns = ("name", "a column of words", "number", "nothing")
    console.print(tables.table("title", columns, rows))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("a_name_of_thirty_four_characters__" in line for line in lines)


def test_good_images_are_answered_and_the_bad_one_is_named(
    cli: Run, out: Path, tmp_path: Path, picture: Path
) -> None:
    bad, other = tmp_path / "truncated.png", tmp_path / "other.png"
    bad.write_bytes(picture.read_bytes()[:-2000])
    other.write_bytes(picture.read_bytes())
    found = tmp_path / "run.json"
    assert cli("run", out, picture, bad, other, "--json", found) == 1
    first, second, third = json.loads(found.read_text())["images"]
    assert len(first["predictions"]) == 5
    assert first["predictions"] == third["predictions"]
    assert first["error"] is None
    assert second["predictions"] == []
    assert "truncated.png cannot be read as an image" in second["error"]
    assert "other.png" in cli.out
    assert f"not read: image={bad} cannot be read" in cli.out
    assert cli("run", out, bad, bad) == 2


def test_json_of_a_run_on_standard_output(out: Path, picture: Path) -> None:
    command = [sys.executable, "-m", "vssm.commands.main", "run", str(out), str(picture)]
    done = subprocess.run([*command, "--json", "-"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["images"][0]["file"] == str(picture)
    assert "probability" in done.stderr


@pytest.mark.parametrize(
    "call",
    [
        lambda model, out: vssm.export(model, out, labels="classes"),
        lambda model, out: vssm.predict(out, out, "found.parquet", tensors="logits"),
        lambda model, out: vssm.compare("a.csv", out),
        lambda model, out: vssm.visualize(vssm.ModelSource("vim_tiny"), "cat.jpg", out),
        lambda model, out: vssm.visualize(vssm.ModelSource("vim_tiny"), Path("cat.jpg"), out),
        lambda model, out: vssm.AblationOptions(ratios="0.5"),
        lambda model, out: vssm.AblationOptions(checkpoints=Path("vim.pth")),
        lambda model, out: vssm.AblationOptions(finetuned={"gap": "gap.safetensors"}),
        lambda model, out: vssm.AblationTraining(out, variants="gap"),
        lambda model, out: vssm.quantize(
            out, None, out, vssm.QuantizeRequest(method="weights", keep_float="*/out_proj/*")
        ),
    ],
)
def test_one_text_where_several_are_taken(call: Any, out: Path, tmp_path: Path) -> None:
    """It would be read letter by letter."""
    with pytest.raises(TypeError, match=r"=.* is one text; give a list"):
        call(micro(), tmp_path)


def test_letters_that_the_terminal_lacks_are_escaped(
    out: Path, picture: Path, tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "Übung.png"
    odd.write_bytes(picture.read_bytes())
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli("run", out, odd) == 0
    sys.stdout.flush()
    assert rb"\xdcbung.png" in written.getvalue()


@pytest.mark.parametrize("more", [(), ("--json", "-")], ids=["tables", "JSON"])
def test_a_reader_that_left_changes_no_exit_code(
    cli: Run, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """As `vssm models | head -1` under `set -o pipefail`: 1 would be a check that failed."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(tables.console, "quiet", False)  # put back at the end
        assert cli("models", *more) == 0


@pytest.mark.parametrize(
    "name",
    ["", *[c.name or c.callback.__name__.replace("_", "-") for c in app.registered_commands]],
)
def test_every_command_has_a_short_help(cli: Run, name: str) -> None:
    assert cli(*filter(None, [name]), "-h") == 0
    assert "Usage" in cli.out


def test_the_shell_completes_names() -> None:
    given = {
        "_VSSM_COMPLETE": "complete_bash",
        "COMP_WORDS": "vssm export vim_t",
        "COMP_CWORD": "2",
    }
    program = "import sys; sys.argv = ['vssm']; from vssm.commands.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **given},
    )
    dense = ["vim_tiny_upernet_ade20k", "vim_tiny_cascade_mask_rcnn_coco"]
    assert done.stdout.split() == ["vim_tiny", "vim_tiny_stride8", *dense], done.stderr


@pytest.mark.parametrize(
    ("given", "policy"), [({}, "passive"), ({"GOMP_SPINCOUNT": "9"}, None)], ids=["unset", "set"]
)
def test_waiting_threads_do_not_spin_unless_the_user_says_so(
    given: dict[str, str], policy: str | None
) -> None:
    """In a script of the user's too: the package's import comes before torch is loaded."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    unset = {k: v for k, v in os.environ.items() if k not in names}
    program = "import os, vssm; print(os.environ.get('OMP_WAIT_POLICY'))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**unset, **given},
    )
    assert done.stdout == f"{policy}\n"


def test_threads_spin_only_where_they_may(out: Path) -> None:
    """Long runs beside other work turn it off; a server on idle cores is quicker with it."""
    for spin in (True, False):
        with vssm.open_session(out, threads=2, spin=spin) as opened:
            options = vars(opened)["_session"].get_session_options()
        entry = options.get_session_config_entry("session.intra_op.allow_spinning")
        assert entry == str(int(spin))


def test_an_export_counts_its_blocks(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    model = micro("1:0.7", depth=2)
    vssm.export(model, tmp_path / "out", progress=lambda *step: told.append(step))
    blocks = [(done, total) for phase, done, total in told if phase == "tracing blocks"]
    assert blocks == [(0, 2), (0, 2), (1, 2), (2, 2)]
    written = [done for phase, done, _ in told if phase == "writing ONNX"]
    assert written == sorted(written)


def test_ctrl_c_says_what_it_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    def work(done: int, error: BaseException) -> None:
        with tables.working("opening the model", leaves="the same command goes on") as tell:
            if done:
                tell("evaluating images", done, 1347)
            raise error

    def stopped(done: int, error: BaseException) -> str:
        with pytest.raises(SystemExit) as stop:
            work(done, error)
        assert stop.value.code == (143 if isinstance(error, SystemExit) else 130)
        # Before it, on a slow machine, what was done before.
        return capsys.readouterr().err.splitlines()[-1]

    said = stopped(636, KeyboardInterrupt())
    assert said == "stopped at 636 of 1,347 (evaluating images); the same command goes on"
    assert "stopped at 9 of 1,347 (evaluating" in stopped(9, SystemExit(143))
    assert "stopped before the first step (opening the model)" in stopped(0, KeyboardInterrupt())


@pytest.mark.parametrize(
    ("cores", "threads", "workers", "shared"),
    [
        *((1, None, None, (1, 0)), (2, None, None, (2, 0)), (3, None, None, (3, 0))),
        *((4, None, None, (3, 1)), (8, None, None, (5, 3)), (64, None, None, (60, 4))),
        # What is given stays, and the other one gets what that leaves.
        *((8, 8, None, (8, 0)), (8, 7, None, (7, 1)), (2, 1, None, (1, 0)), (8, None, 0, (8, 0))),
        *((2, None, 2, (1, 2)), (8, None, 6, (2, 6)), (2, 4, 4, (4, 4))),
    ],
)
def test_threads_and_workers_share_the_cores(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    threads: int | None,
    workers: int | None,
    shared: tuple[int, int],
) -> None:
    monkeypatch.setattr(session, "usable_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert session.share_cores(threads, workers) == shared
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert session.share_cores(threads, workers)[0] == (threads or 1)
    with pytest.raises(ValueError, match="workers=-1 is below 0"):
        session.share_cores(None, -1)


def _options(command: typer.models.CommandInfo) -> set[str]:
    return set(inspect.signature(command.callback).parameters)  # type: ignore[arg-type]


def test_every_command_that_computes_takes_threads_and_seeds() -> None:
    named = {
        c.name or c.callback.__name__.replace("_", "-"): _options(c)  # type: ignore[union-attr]
        for c in app.registered_commands
    }
    # A bundle is copied, and its check runs one image.
    assert {n for n, has in named.items() if "threads" not in has} == {"models", "doctor", "bundle"}
    random = {n for n, has in named.items() if "seed" in has}
    assert random == {"export", "export-module", "finetune", "ablate", "visualize", "quantize"}


class _ReachedError(ValueError):
    pass


@pytest.mark.parametrize(
    ("command", "rest", "work"),
    [
        ("export", "vim_tiny -o NEW", "vssm.training.run.build_model"),
        ("export-module", "FILE:build -o NEW", "vssm.compat.factory.build_from"),
        ("check", "EXPORT", "vssm.runtimes.torch.oracle"),
    ],
)
def test_threads_are_those_of_torch_too(
    cli: Run,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    rest: str,
    work: str,
) -> None:
    def reached(*_: object, **__: object) -> None:
        raise _ReachedError(f"{torch.get_num_threads()} threads")

    monkeypatch.setattr(work, reached)
    (tmp_path / "model.py").touch()
    places = {"NEW": tmp_path / "new", "EXPORT": out, "FILE:build": f"{tmp_path}/model.py:build"}
    words = [places.get(word, word) for word in rest.split()]
    before = torch.get_num_threads()
    assert cli(command, *words, "--threads", before + 1) == 2
    assert f"{before + 1} threads" in cli.out
    assert torch.get_num_threads() == before


class _TalkativeError(RuntimeError):
    def __str__(self) -> str:
        return (
            "run(): incompatible function arguments. The following argument types are supported:\n"
            "    1. (self: Session, arg0: list[str])\nInvoked with: <object at 0x7f>"
        )


def test_an_error_of_another_library_is_one_line() -> None:
    assert reason(_TalkativeError()) == "_TalkativeError: run(): incompatible function arguments."
    hint = RuntimeError('cannot guard on u0. For more information, run with TORCH_LOGS="dynamic"')
    assert reason(hint) == "RuntimeError: cannot guard on u0."
    assert reason(RuntimeError("one\ntwo")) == "RuntimeError: one"
    assert reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("x" * 10_000))) < 400


def test_a_session_says_why_it_is_not_pickled(out: Path) -> None:
    with vssm.open_session(out) as session:
        with pytest.raises(TypeError, match=r"cannot be pickled or copied; .*open_session"):
            pickle.dumps(session)
        with pytest.raises(TypeError, match=r"pickled or copied"):
            copy.copy(session)


def test_a_path_that_is_no_utf8_is_named(out: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.png"
    command = [sys.executable, "-m", "vssm.commands.main", "run", os.fsencode(out), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert r"\udcff.png cannot be read as an image" in " ".join(done.stderr.split())


_WRONG = [
    ("export", "vim_tiny -o NEW --dtype int8"),
    ("export", "vim_tiny -o NEW --opset 17"),
    ("export", "vim_tiny -o NEW --schedule 1:0.8,x"),
    ("export", "vim_tiny -o NEW --schedule 1:0.8 --alignment aligned"),
    ("export", "vim_tiny -o NEW --labels ABSENT"),
    ("export", "vim_tiny -o NEW --checkpoint ABSENT"),
    ("export", "vim_tiny -o NEW --set image_size=224y320"),
    ("export", "vim_tiny -o NEW --set depth=many"),
    ("export", "vim_tiny -o NEW --threads 0"),
    ("export", "vim_tiny -o NEW --seed 3"),
    ("export", "vim_tiny -o NEW --schedule 1:0.8 --importance l1 --seed 3"),
    ("export", "vim_tiny -o EXPORT"),
    ("export", "vim_tiny -o NEW --json ABSENT/x.json"),
    ("export-module", "model.py:build -o NEW --opset 17"),
    ("export-module", "model.py:build -o NEW --schedule 1"),
    ("export-module", "model.py:build -o NEW --threads 0"),
    ("export-module", "model.py:build -o NEW --schedule 1:0.8 --seed 3"),
    ("export-module", "model.py:build -o NEW --labels ABSENT"),
    ("export-module", "model.py:build -o NEW --checkpoint ABSENT"),
    ("export-module", "model.py:build -o NEW --prefer theirs"),
    ("export-module", "model.py:build -o NEW --input 1x4x8x8 --imagenet"),
    ("export-module", "model.py:build -o NEW --scan model.scan"),
    ("export-module", "model.py:build -o EXPORT"),
    ("check", "EXPORT --runtime ort"),
    ("check", "EXPORT --backend fast"),
    ("check", "EXPORT --threads 0"),
    ("check", "EXPORT --trust"),
    ("run", "EXPORT x.png --runtime ort"),
    ("run", "EXPORT x.png --top 0"),
    ("bench", "EXPORT --runtime ort"),
    ("bench", "EXPORT --batch one"),
    ("engine", "EXPORT --batch 1,2"),
    ("engine", "EXPORT --threads 0"),
    ("bundle", "EXPORT -o NEW --batch 1,2"),
    ("evaluate", "EXPORT . --runtime ort"),
    ("evaluate", "EXPORT . --workers -1"),
    ("predict", "EXPORT . -o NEW.parquet --runtime ort"),
    ("predict", "EXPORT . -o NEW.csv"),
    ("finetune", "vim_tinny --data . -o NEW"),
    ("finetune", "vim_tiny --data . -o NEW --set imagesize=3"),
    ("finetune", "vim_tiny --data . -o NEW --recipe speed=3"),
    ("ablate", "vim_tinny . -o NEW"),
    ("ablate", "vim_tiny . -o NEW --device tpu"),
    ("visualize", "vim_tiny x.png -o NEW --schedule 1:2"),
    ("visualize", "vim_tiny x.png -o NEW --blocks one"),
]


@pytest.mark.parametrize(("command", "rest"), _WRONG, ids=str)
def test_a_wrong_option_is_refused_before_any_work(
    cli: Run,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    rest: str,
) -> None:
    def reached(*_: object, **__: object) -> None:
        pytest.fail("work was begun")

    for work in (
        "vssm.models.base.VisionModel.__init__",  # on the class: names are bound at import
        "vssm.onnx.export.build_proto",
        "vssm.compat.factory.build_from",
        "vssm.runtimes.ort.OrtSession.run_feeds",
        "vssm.training.run.build_model",
    ):
        monkeypatch.setattr(work, reached)
    places = {"NEW": tmp_path / "new", "EXPORT": out, "ABSENT": tmp_path / "absent"}
    words = [str(places.get(word, word)) for word in rest.split()]
    words = [word.replace("ABSENT", str(places["ABSENT"])) for word in words]
    assert cli(command, *words) == 2, cli.out
    assert "work was begun" not in cli.out
    assert list(tmp_path.iterdir()) == []
