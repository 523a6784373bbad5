"""`vssm export-module --survey`: many models, each in a process of its own, and a table of them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from vssm.commands.tables import show, table, working, write_result
from vssm.commands.user_module import (
    DEFAULT_INPUT,
    ModuleRequest,
    export_user_module,
    read_inputs,
)
from vssm.errors import VssmError, reason
from vssm.files.atomic import atomic_write_bytes, make_directory
from vssm.files.json import json_text
from vssm.runtimes.session import checked_threads

_KEYS: Final = frozenset(
    {
        *("name", "target", "input", "tokens", "set", "path", "prefer", "scan", "outputs"),
        *("static_batch", "dynamic", "no_reference"),
    }
)
# Steps in which a model can fail, by the first phase that comes behind them.
STEPS: Final = ("imports and builds", "runs", "exports", "agrees")
COLUMNS: Final = (
    *("model", "commit", "reached", "scans", "mixers", "nodes", "error", "CPU s", "blocks", "GB"),
    *("seconds", "why not"),
)


@dataclass(frozen=True)
class SurveyRow:
    """What became of one model.

    Attributes:
        name: as the survey calls it.
        commit: of the repository that its code is in; None where it is in none.
        reached: the last of `STEPS` that it passed; None where it passed none.
        scans: scan nodes in its file.
        mixers: modules of the model that those are in.
        nodes: all nodes of its file.
        error: largest error against the module's exact answers, over their largest value.
        cpu_seconds: CPU time of the export, from the start of Python.
        blocks: entries of the model's lists and sequences that those are in.
        gigabytes: most memory that the process held until then.
        seconds: wall time, the check and the end of the process included.
        why_not: the error of the step that it did not pass.
    """

    name: str
    commit: str | None = None
    reached: str | None = None
    scans: int | None = None
    mixers: int | None = None
    nodes: int | None = None
    error: float | None = None
    cpu_seconds: float | None = None
    blocks: int | None = None
    gigabytes: float | None = None
    seconds: float = 0.0
    why_not: str | None = None


def survey_modules(
    file: Path,
    directory: Path,
    json_file: Path | None,
    *,
    time_limit: float,
    threads: int | None = None,
) -> list[SurveyRow]:
    """Export and check every model that `file` names, and write survey.md and the exports.

    Args:
        file: a JSON list of objects with `name`, `target`, and what else the options of
            `export-module` are called; folders are relative to the file.
        directory: where the exports and survey.md go; what is there is replaced.
        json_file: where the rows go as JSON, too.
        time_limit: seconds for each model.
        threads: of each export and check.

    Raises:
        ValueError: the file is no such list.
    """
    entries = _entries(file)
    checked_threads(threads)
    make_directory(directory)
    rows: list[SurveyRow] = []
    with working("exporting models", leaves="exports that are done stay") as tell:
        for entry in entries:
            tell("exporting models", len(rows), len(entries), str(entry["name"]))
            rows.append(_in_a_process(entry, file.parent, directory, time_limit, threads))
    cells = [_cells(row) for row in rows]
    show(table(f"{len(rows)} models", COLUMNS, cells))
    lines = [COLUMNS, ["---"] * len(COLUMNS), *cells]
    text = "".join(f"| {' | '.join('-' if c is None else str(c) for c in r)} |\n" for r in lines)
    atomic_write_bytes(directory / "survey.md", text.encode())
    write_result(json_file, rows)
    return rows


def _entries(file: Path) -> list[dict[str, Any]]:
    try:
        entries: Any = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"survey={file} cannot be read as JSON: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ValueError(
            f"survey={file}: it is not a list of objects; write [{{'name': ...}}, ...]"
        )
    for entry in entries:
        if unknown := sorted(entry.keys() - _KEYS):
            raise ValueError(
                f"survey={file}: {entry.get('name')!r} has {unknown}; the keys are "
                f"{', '.join(sorted(_KEYS))}"
            )
        if absent := sorted({"name", "target"} - entry.keys()):
            raise ValueError(f"survey={file}: an entry has no {absent}; give every entry both")
    names = [_folder(str(entry["name"])) for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"survey={file}: two entries have one name; each has a folder by its name")
    return list(entries)


def _folder(name: str) -> str:
    """What the folder of an entry's export is called."""
    return "".join(c if c.isalnum() else "_" for c in name)


def _in_a_process(
    entry: Mapping[str, Any], folder: Path, directory: Path, time_limit: float, threads: int | None
) -> SurveyRow:
    """A row of one entry: code of a repository may crash, hang, or change its process."""
    began = time.monotonic()
    place = directory / _folder(entry["name"])
    work = {"entry": entry, "folder": str(folder), "place": str(place), "threads": threads}
    command = [sys.executable, "-m", __name__]
    row = SurveyRow(entry["name"])
    try:
        done = subprocess.run(
            command,
            input=json.dumps(work),
            capture_output=True,
            text=True,
            timeout=time_limit,
            check=False,
        )
        # The last line that is ours: a repository's code prints what it likes.
        told = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
        found = json.loads(told[-1][len(_MARK) :]) if told else {}
        row = SurveyRow(**{**asdict(row), **found})
        if done.returncode and row.why_not is None:
            row = SurveyRow(**{**asdict(row), "why_not": f"it ended with {done.returncode}"})
    except subprocess.TimeoutExpired:
        row = SurveyRow(entry["name"], why_not=f"not finished after {time_limit:g} s")
    return SurveyRow(**{**asdict(row), "seconds": round(time.monotonic() - began, 1)})


def _cells(row: SurveyRow) -> list[object]:
    error = None if row.error is None else f"{row.error:.1e}"
    why_not = None if row.why_not is None else " ".join(row.why_not.split()).replace("|", "/")
    return [
        *(row.name, row.commit, row.reached, row.scans, row.mixers, row.nodes, error),
        *(row.cpu_seconds, row.blocks, row.gigabytes, row.seconds, why_not),
    ]


_MARK: Final = "vssm survey row: "


def _work(
    entry: Mapping[str, Any], folder: Path, place: Path, threads: int | None
) -> dict[str, Any]:
    """Export and check one model, in this process; told again after every step."""
    row: dict[str, Any] = {}

    def passed(step: str, **found: Any) -> None:
        row.update(reached=step, **found)
        print(_MARK + json_text(row).replace("\n", " "), flush=True)

    def progress(phase: str, step: int, steps: int, note: str = "", /) -> None:
        if phase.startswith("importing ") and step == steps:
            passed(STEPS[0])
        elif phase.startswith("tracing") and step == 0:
            passed(STEPS[1])

    try:
        request = replace(_request(entry, folder), threads=threads)
        row["commit"] = _commit(Path(request.target.rpartition(":")[0]), request.paths)
        artifact = export_user_module(request, place, force=True, progress=progress).artifact
        from vssm.onnx.describe import count_by_module

        spent = _spent()
        passed(STEPS[2], **asdict(count_by_module(artifact.model_path)), **spent)
        if request.reference:
            from vssm.parity.check import check_parity

            report = check_parity(None, artifact, threads=threads)
            row["error"] = report.forced.relative
            if report.passed:
                passed(STEPS[3])
            else:
                row["why_not"] = "; ".join(report.failures)
    except (VssmError, ValueError, TypeError, OSError, MemoryError) as error:
        row["why_not"] = reason(error)
    print(_MARK + json_text(row).replace("\n", " "), flush=True)
    return row


def _spent() -> dict[str, float]:
    """What this process has taken so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    # Linux counts memory in KiB.
    gigabytes = used.ru_maxrss * 1024 / 1e9
    return {
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "gigabytes": round(gigabytes, 2),
    }


def _request(entry: Mapping[str, Any], folder: Path) -> ModuleRequest:
    place, _, factory = str(entry["target"]).rpartition(":")
    given = entry.get("input", DEFAULT_INPUT)
    return ModuleRequest(
        target=f"{folder / place}:{factory}",
        inputs=read_inputs(
            [str(text) for text in (given if isinstance(given, list) else [given])],
            entry.get("tokens"),
        ),
        options=entry.get("set", {}),
        paths=tuple(folder / path for path in entry.get("path", [])),
        prefer=entry.get("prefer", "ours"),
        scans=entry.get("scan", {}),
        outputs=tuple(entry["outputs"]) if "outputs" in entry else None,
        dynamic=tuple(entry.get("dynamic", ())),
        static_batch=bool(entry.get("static_batch", False)),
        reference=not entry.get("no_reference", False),
    )


def _commit(target: Path, paths: tuple[Path, ...]) -> str | None:
    """The commit of the first of these places that is in a repository."""
    for place in (target, *paths):
        inside = place if place.is_dir() else place.parent
        command = ["git", "-C", str(inside), "rev-parse", "--short", "HEAD"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:  # no git on this machine
            return None
        if done.returncode == 0:
            return done.stdout.strip()
    return None


if __name__ == "__main__":
    given = json.load(sys.stdin)
    _work(given["entry"], Path(given["folder"]), Path(given["place"]), given["threads"])
