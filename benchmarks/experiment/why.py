"""Where pruning hurts: what it does to the convolution, to the scan's state and to the logits.

The first stage chooses by scores of the dense layers, so every variant keeps the same tokens there,
and the layer behind it (the probe) has the dense model's inputs at these tokens. What differs there
is the convolution's neighbours and the scan. All errors are relative: |x - dense| / |dense|, norms
over the kept tokens of all images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmarks.experiment.cases import DENSE, Case
from benchmarks.experiment.held import KEY, held_input, times_gap
from benchmarks.experiment.work import Images, build, variants
from torch import Tensor

from vssm.files.json import write_json
from vssm.models import ForwardDetails, VisionModel
from vssm.ops import operators as ops
from vssm.ops import reference

_IMAGES = 64  # of the first batch
_REACH_IMAGES = 8
_NEAR = 4  # tokens
Call = Mapping[str, Any]


@torch.inference_mode()
def explain(case: Case, weights: Path, images: Images, output: Path) -> None:
    """Write what `report` reads, for one seed's dense weights."""
    if output.exists():
        return
    batch = torch.from_numpy(images.batches[len(images.batches) // 2][0][:_IMAGES])
    known = variants(case)
    keys = [k for k in known if k.partition("+")[0] in {"none", "gap", "constant", "masked", KEY}]
    runs = {}
    for key in (DENSE, *keys):
        model, _ = build(case, known[key], weights)
        model.use_backend("reference")
        runs[key] = _record(model, batch, key)
    dense, calls = runs.pop(DENSE)
    stage = min(int(part.split(":")[0]) for part in case.schedule.split(","))
    kept = runs["none"][0].kept_positions[0]
    probe = {key: found[stage] for key, (_, found) in runs.items() if key != "masked"}
    reached = [_reach(call) for call in calls]
    write_json(
        output,
        {
            "tokens_of_memory": [_memory(call) for call in calls],
            "mean_lag": [lag for lag, _ in reached],
            "share_near": [near for _, near in reached],
            "convolution": {
                k: _u_error(found[stage], calls[stage], kept) for k, (_, found) in runs.items()
            },
            "state": _states(calls[stage], probe, kept),
            "state_over_skip": _state_over_skip(calls[stage]),
            "logits": {k: _error(d.logits, dense.logits) for k, (d, _) in runs.items()},
            "gap_from_none": _error(runs["gap"][0].logits, runs["none"][0].logits),
        },
    )


def _record(model: VisionModel, batch: Tensor, key: str) -> tuple[ForwardDetails, list[Call]]:
    """A forward pass, and what each layer's scan was called with."""
    calls: list[Call] = []

    def record(*tensors: Tensor, **rest: Any) -> Tensor:
        named = dict(zip(("u", "delta", "A", "B", "C"), tensors, strict=True)) | rest
        calls.append(named)
        return original(*tensors, **rest)

    original = ops.selective_scan
    with mock.patch.object(ops, "selective_scan", record), held_input(key):
        details = model.forward_details(batch)
    return details, calls


def _state_part(call: Call, **changes: Any) -> Tensor:
    """The scan's output (batch, seqlen, d_inner) without skip and gate, in float64."""
    given = {**call, **changes, "z": None}
    given.pop("backend")
    wide = {k: v.double() if _is_float(v) else v for k, v in given.items()}
    return reference.selective_scan(**{**wide, "D": torch.zeros_like(wide["D"])})


def _is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _at(x: Tensor, kept: Tensor) -> Tensor:
    """Rows of x (1 or batch, seqlen, ...) at the kept places (batch, n)."""
    x = x.expand(len(kept), *x.shape[1:])
    index = kept.reshape(*kept.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def _error(x: Tensor, wanted: Tensor) -> float:
    return float((x.double() - wanted.double()).norm() / wanted.double().norm())


def _u_error(call: Call, dense: Call, kept: Tensor) -> float:
    """What the convolution's other neighbours change of the scan's input."""
    u = call["u"]
    if u.shape[1] != kept.shape[1]:  # masked tokens are in their places
        u = _at(u, kept)
    return _error(u, _at(dense["u"], kept))


def _states(dense: Call, probe: Mapping[str, Call], kept: Tensor) -> dict[str, dict[str, float]]:
    """Error and size of the state's part of the output, as run and with the dense convolution.

    "inputs missing" has the true decays of all tokens and loses the pruned tokens' inputs alone:
    no alignment can be nearer to the dense model than by chance.
    """
    wanted = _at(_state_part(dense), kept)
    there = torch.zeros(dense["u"].shape[:2], dtype=torch.bool).scatter(1, kept, True)
    rows = {"inputs missing": _at(_state_part(dense, u=dense["u"] * there[..., None, None]), kept)}
    for key, call in probe.items():
        rows[key] = _state_part(call)
        if not call.get("params_by_step") and "+" not in key:
            own = {n: _at(dense[n], kept) for n in ("u", "delta", "B", "C")}
            if key == KEY:
                own["B"] = times_gap(own["B"], order=call["order"], gap=call["gap"])
            rows[f"{key}, dense convolution"] = _state_part(call, **own)
    return {
        key: {
            "error": _error(y, wanted),
            "size": float(y.norm() / wanted.norm()),
            "along": float((y * wanted).sum() / wanted.square().sum()),
        }
        for key, y in rows.items()
    }


def _state_over_skip(dense: Call) -> float:
    """Norm of what the state says over that of the token's own input through D."""
    state = _state_part(dense)
    skip = (dense["D"] * dense["u"]).sum(2) * dense.get("scale", 1.0)
    return float(state.norm() / skip.norm())


def _by_step(call: Call, name: str, images: int) -> Tensor:
    """An operand (images, seqlen, K, width) in the order of the steps."""
    x, order = call[name][:images], call["order"].long()
    x = x.expand(-1, -1, order.shape[1], -1)
    if call.get("params_by_step") and name != "u":
        return x
    index = order.expand(len(x), -1, -1).transpose(1, 2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(1, index)


def _dt(call: Call, images: int) -> Tensor:
    return torch.nn.functional.softplus(_by_step(call, "delta", images) + call["delta_bias"])


def _memory(call: Call) -> dict[str, float]:
    """Tokens until a state has decayed to 1 / e, 1 / (delta |A|): quantiles over all states."""
    rate = _dt(call, _REACH_IMAGES)[..., None] * -call["A"]
    tokens = (1 / rate).flatten()
    tokens = tokens[:: math.ceil(len(tokens) / 1_000_000)]
    return {str(q): float(tokens.quantile(q)) for q in (0.1, 0.5, 0.9)}


def _reach(call: Call) -> tuple[float, float]:
    """How far back, in tokens, what a scan reads lies: mean lag, and the share nearer than _NEAR.

    Of the weights |w_ij|, w_ij = dt_j u_j sum_n C_in B_jn exp(A_n (dt_j+1 + ... + dt_i)).
    """
    dt = _dt(call, _REACH_IMAGES).transpose(1, 2)  # (images, K, seqlen, d_inner)
    u, B, C = (_by_step(call, n, _REACH_IMAGES).transpose(1, 2) for n in ("u", "B", "C"))
    A, span = call["A"], dt.cumsum(2)
    length = dt.shape[2]
    by_lag = []
    for lag in range(length):
        passed = span[:, :, lag:] - span[:, :, : length - lag]
        decay = torch.exp(passed[..., None] * A[:, None])
        pair = C[:, :, lag:] * B[:, :, : length - lag]
        w = (decay * pair[..., None, :]).sum(-1) * (dt * u)[:, :, : length - lag]
        by_lag.append(w.abs().sum())
    weight = torch.stack(by_lag) / torch.stack(by_lag).sum()
    lags = torch.arange(length)
    return float((weight * lags).sum()), float(weight[:_NEAR].sum())
