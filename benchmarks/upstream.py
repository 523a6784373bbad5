"""Exports public models from clones, checks them against a naive scan, and prints a table.

    VSSM_UPSTREAM=/path/to/clones python benchmarks/upstream.py -o surveyed/ [NAME...]

`upstream.json` says which models and with which options; its folders are below VSSM_UPSTREAM, and
`packages` and `packages-torchvision` there are folders with what some of them need (`pip install
--target`), and `packages-dwconv2d` and `packages-pointmamba` hold in PyTorch what is compiled
there. Each model is exported and checked as by `vssm export-module --survey`. Then its file is run
beside the model in PyTorch over a plain loop in float64, which shares no code with this package's
operators.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

HERE = Path(__file__).resolve().parent
COLUMNS = ("repository, unmodified", "commit", "scan nodes", "a mixer", "nodes", "error")
FURTHER = ("naive scan", "CPU s", "s a block", "GB")


def naive_scan(  # noqa: PLR0917 - as upstream has it
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """mamba_ssm's selective scan as a plain loop over time, in float64."""
    kind = u.dtype
    u, delta, A, B, C = (x.double() for x in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.double()[:, None]
    if delta_softplus:
        delta = functional.softplus(delta)
    # (batch, d_inner, d_state, seqlen): consecutive channels share a group.
    B, C = (x[:, None] if x.dim() == 3 else x for x in (B, C))
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], dim=1) for x in (B, C))
    state, rows = u.new_zeros(*u.shape[:2], B.shape[2]), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * B[..., t] * u[:, :, t, None]
        rows.append((state * C[..., t]).sum(-1))
    y = torch.stack(rows, dim=-1)
    y = y if D is None else y + D.double()[:, None] * u
    y = y if z is None else y * functional.silu(z.double())
    return (y.to(kind), state) if return_last_state else y.to(kind)


def naive_heads(scan: Any) -> Tensor:
    """Mamba-2's scan of heads, as the scan of their channels."""
    width = scan.u.shape[2] // scan.A.shape[0]

    def wide(x: Tensor, dim: int) -> Tensor:
        return x.repeat_interleave(width, dim=dim)

    skip = scan.D
    if skip is not None:
        skip = wide(skip, 0) if skip.dim() == 1 else skip.flatten()
    y: Tensor = naive_scan(
        scan.u.transpose(1, 2),
        wide(scan.dt, 2).transpose(1, 2),
        wide(scan.A, 0)[:, None],
        scan.B.permute(0, 2, 3, 1),
        scan.C.permute(0, 2, 3, 1),
        skip,
        None if scan.z is None else scan.z.transpose(1, 2),
        None if scan.dt_bias is None else wide(scan.dt_bias, 0),
        scan.softplus,
    )
    return y.transpose(1, 2)


def use_naive_scans() -> None:
    """Let what stands in for upstream's scans be the loops above, in this process."""
    from vssm.compat.packages import blocks, provided, scan, ssd

    # Of no module: `upstream` would know it for a scan of this one, and put ours in its place.
    naive_scan.__module__ = ""
    naive, ours = naive_scan, scan.selective_scan_fn
    for names in (*provided.FUNCTIONS.values(), *provided.PACKAGES.values()):
        for name in [name for name, found in names.items() if found is ours]:
            names[name] = naive
    scan.selective_scan_fn = blocks.selective_scan_fn = naive  # type: ignore[attr-defined]
    ssd._run = naive_heads


def distance_to_naive(entry: Mapping[str, Any], directory: Path) -> float:
    """The largest difference of an export's outputs to the naive model's, over the largest."""
    import vssm
    from vssm.artifact.reference import stored_reference
    from vssm.compat.exact import evaluating
    from vssm.compat.factory import build_from, search_path
    from vssm.compat.inputs import Inputs
    from vssm.compat.outputs import module_outputs

    use_naive_scans()
    target, folders = entry["target"], [Path(path) for path in entry.get("path", [])]
    artifact = vssm.artifact.directory.open_artifact(directory)
    x = stored_reference(artifact)[0]
    with vssm.open_session(directory, threads=1) as session:
        got = session.run(x)
    with search_path(target, folders), vssm.compat.upstream(scans=entry.get("scan", {})):
        torch.manual_seed(0)  # the weights of the export
        model = build_from(target, entry.get("set", {}))
        with evaluating(model), torch.no_grad():
            given = Inputs.again(x, artifact.manifest.config)
            want = module_outputs(entry.get("outputs"))(model, given)
    return max(
        float((torch.from_numpy(got[name]).double() - y.double()).abs().max() / y.abs().max())
        for name, y in want.items()
    )


def _entries(root: Path, names: list[str]) -> list[dict[str, Any]]:
    """The entries of `upstream.json` that have a clone, with whole paths."""
    entries = json.loads((HERE / "upstream.json").read_text("utf-8"))
    for entry in entries:
        own = entry["target"].startswith("upstream_factories.py")
        entry["target"] = str((HERE if own else root) / entry["target"])
        entry["path"] = [str(root / path) for path in entry.get("path", [])]
    chosen = [e for e in entries if not names or e["name"] in names]
    places = {e["name"]: [e["target"].rpartition(":")[0], *e["path"]] for e in chosen}
    return [e for e in chosen if all(Path(place).exists() for place in places[e["name"]])]


def _version(entry: Mapping[str, Any]) -> str:
    """The commit of the first folder of an entry, or the version of an installed package."""
    place = next(
        p for p in (entry["target"], *entry.get("path", [])) if not p.startswith(str(HERE))
    )
    folder = Path(place.rpartition(":")[0] or place)
    folder = folder if folder.is_dir() else folder.parent
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout.strip()
    package = entry["name"].partition(",")[0].rpartition("/")[2]
    return next(folder.glob(f"{package}-*.dist-info")).stem.partition("-")[2]


def _row(entry: Mapping[str, Any], row: Mapping[str, Any], naive: float) -> list[str]:
    block = max(row["cpu_seconds"] - 10, 0) / row["blocks"]
    cells = [row["name"], _version(entry), row["scans"]]
    cells += [f"{row['scans'] / row['mixers']:g}", row["nodes"], f"{row['error']:.1e}"]
    cells += [f"{naive:.1e}", row["cpu_seconds"], f"{block:.1f}", row["gigabytes"]]
    return [str(cell) for cell in cells]


def main() -> None:
    """Run the survey, compare, and print the table and what was refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--time-limit", default="900")
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    entries = _entries(Path(os.environ["VSSM_UPSTREAM"]).resolve(), asked.names)
    survey, result = asked.output / "survey.json", asked.output / "rows.json"
    survey.write_text(json.dumps(entries), "utf-8")
    command = [sys.executable, "-m", "vssm.commands.main", "export-module"]
    options = ["--survey", survey, "-o", asked.output, "--json", result]
    subprocess.run([*command, *options, "--time-limit", asked.time_limit], check=True)
    rows = {row["name"]: row for row in json.loads(result.read_text("utf-8"))}
    lines = [[*COLUMNS, *FURTHER], ["---"] * len([*COLUMNS, *FURTHER])]
    for entry in entries:
        row = rows[entry["name"]]
        if row["reached"] != "agrees":
            print(f"{row['name']} ({row['seconds']} s): {row['why_not']}", file=sys.stderr)
            continue
        folder = asked.output / "".join(c if c.isalnum() else "_" for c in entry["name"])
        given = json.dumps([entry, str(folder)])
        done = subprocess.run(
            [sys.executable, __file__, "--naive"],
            input=given,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{entry['name']}: {done.stderr[-2000:]}")
        lines.append(_row(entry, row, float(done.stdout.splitlines()[-1])))
    print("".join(f"| {' | '.join(line)} |\n" for line in lines))


if __name__ == "__main__":
    # One model a process: repositories have modules of one name.
    if sys.argv[1:] == ["--naive"]:
        sys.path.remove(str(HERE))  # whose models.py would stand for a repository's folder `models`
        of, place = json.load(sys.stdin)
        print(distance_to_naive(of, Path(place)))
    else:
        main()
