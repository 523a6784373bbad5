"""Pruned Vim, written a second time: image by image and place by place, from the method's text.

An aligned scan walks the whole line: a kept place takes a step, a pruned place decays the state.
Nothing here runs the package: a model gives its weights, a configuration and a schedule their
switches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional

from vssm.models.vim import VimConfig
from vssm.pruning.schedule import PruneSchedule


@dataclass
class Line:
    """One image's tokens: their places in list order, (tokens, d_model) hidden and residual."""

    places: list[int]
    hidden: Tensor
    residual: Tensor
    masked: set[int] = field(default_factory=set)  # places zeroed where they stand


@dataclass
class Outcome:
    """Logits (classes,), and per stage the kept places and the scores of the tokens present."""

    logits: Tensor
    kept: list[list[int]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class VimByHand:
    """A Vim (bimamba v2, RMSNorm, no rope) from its official state_dict in float64."""

    config: VimConfig
    state: dict[str, Tensor]
    schedule: PruneSchedule

    def run(self, image: Tensor) -> Outcome:
        """One image (3, height, width), float64."""
        x = self._embed(image)
        line = Line(list(range(len(x))), torch.zeros_like(x), x)
        outcome = Outcome(x)
        for block in range(self.config.depth):
            prefix = f"layers.{block}."
            line.residual = line.residual + line.hidden
            y, gate = self._scans(line, self._norm(line.residual, prefix + "norm"), prefix)
            out = (y[0] + y[1]) * gate @ self.state[prefix + "mixer.out_proj.weight"].T
            line.hidden = out
            if block + 1 in self.schedule.ratios:
                score = self._score(y, gate)
                self._prune(line, score, Fraction(self.schedule.ratios[block + 1]), outcome)
        outcome.logits = self._logits(line)
        return outcome

    @property
    def _class_place(self) -> int | None:
        return {"middle": self.config.patches // 2, "head": 0}.get(self.config.class_token)

    def _embed(self, image: Tensor) -> Tensor:
        weight, bias = self.state["patch_embed.proj.weight"], self.state["patch_embed.proj.bias"]
        grid = functional.conv2d(image[None], weight, bias, stride=self.config.stride)
        rows = list(grid[0].flatten(1).T)
        if self._class_place is not None:
            rows.insert(self._class_place, self.state["cls_token"][0, 0])
        return torch.stack(rows) + self.state["pos_embed"][0]

    def _norm(self, x: Tensor, key: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.state[key + ".weight"]

    def _scans(self, line: Line, x: Tensor, prefix: str) -> tuple[list[Tensor], Tensor]:
        """Both directions' ungated scans (tokens, d_inner) in list order, and the gate."""
        prefix += "mixer."
        part, z = (x @ self.state[prefix + "in_proj.weight"].T).chunk(2, dim=-1)
        share = 0.5 if self.config.divide_out else 1.0
        ys = [share * self._branch(line, part, prefix, suffix) for suffix in ("", "_b")]
        return ys, z * z.sigmoid()

    def _branch(self, line: Line, x: Tensor, prefix: str, suffix: str) -> Tensor:
        w = {name: self.state[f"{prefix}{name}{suffix}.weight"] for name in ("x_proj", "dt_proj")}
        bias = self.state[f"{prefix}dt_proj{suffix}.bias"]
        A = -torch.exp(self.state[prefix + ("A_b_log" if suffix else "A_log")])
        D = self.state[prefix + ("D_b" if suffix else "D")]
        rank, states = w["dt_proj"].shape[1], A.shape[1]

        def project(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dt, B, C = (u @ w["x_proj"].T).split([rank, states, states], dim=-1)
            return functional.softplus(dt @ w["dt_proj"].T + bias), B, C

        u = self._convolve(line, x, prefix + "conv1d" + suffix, backward=bool(suffix))
        dt, B, C = project(u)
        zero_token = functional.silu(self.state[f"{prefix}conv1d{suffix}.bias"])
        h, y = torch.zeros_like(A), torch.zeros_like(u)
        for slot, passed in self._walk(line, backward=bool(suffix)):
            constant = self.schedule.alignment == "constant"
            step = project(zero_token)[0] if constant else dt[slot]
            for _ in range(passed):
                h = torch.exp(step[:, None] * A) * h
            h = torch.exp(dt[slot][:, None] * A) * h + (dt[slot] * u[slot])[:, None] * B[slot]
            y[slot] = h @ C[slot] + D * u[slot]
        return y

    def _walk(self, line: Line, *, backward: bool) -> Iterator[tuple[int, int]]:
        """Slots in scan order, each with the pruned places that were passed on the way to it."""
        direction = -1 if backward else 1
        if self.schedule.alignment in {"none", "masked"}:
            yield from ((slot, 0) for slot in list(range(len(line.places)))[::direction])
            return
        slots = {place: slot for slot, place in enumerate(line.places)}
        passed = 0
        for place in list(range(self.config.seqlen))[::direction]:
            if place in slots:
                yield slots[place], passed
                passed = 0
            else:
                passed += 1

    def _convolve(self, line: Line, x: Tensor, key: str, *, backward: bool) -> Tensor:
        """Silu of the causal convolution along the list, or the full line (conv="position")."""
        weight, bias = self.state[key + ".weight"][:, 0], self.state[key + ".bias"]
        grid = self.schedule.conv == "position" and self.schedule.alignment != "masked"
        cells = line.places if grid else list(range(len(x)))
        length = self.config.seqlen if grid else len(x)
        found = dict(zip(cells, x, strict=True))
        behind = 1 if backward else -1
        rows = []
        for cell in cells:
            row = bias
            for tap in range(weight.shape[1]):
                other = cell + behind * (weight.shape[1] - 1 - tap)
                if 0 <= other < length and other in found:
                    row = row + weight[:, tap] * found[other]
            rows.append(functional.silu(row))
        return torch.stack(rows)

    def _score(self, y: list[Tensor], gate: Tensor) -> list[float]:
        schedule = self.schedule
        if schedule.importance == "as_released":
            values: list[float] = (y[1] * gate).mean(-1).tolist()
            return values[::-1]
        scored = {"sum": y[0] + y[1], "forward": y[0], "backward": y[1]}[schedule.score_direction]
        scored = scored * gate if schedule.gated else scored
        formula = {
            "clip": lambda v: v.clamp(min=0).mean(-1),
            "sum": lambda v: v.mean(-1),
            "l1": lambda v: v.abs().mean(-1),
            "l2": lambda v: (v * v).sum(-1).sqrt(),
        }[schedule.importance]
        return list(formula(scored).tolist())

    def _prune(self, line: Line, score: list[float], ratio: Fraction, outcome: Outcome) -> None:
        present = [slot for slot, place in enumerate(line.places) if place not in line.masked]
        outcome.scores.append([score[slot] for slot in present])
        cls = next((s for s in present if line.places[s] == self._class_place), None)
        count = math.ceil(ratio * (len(present) - (cls is not None)))
        count += count % 2 == 0  # an odd number, the class token among them
        count = len(present) if ratio == 1 else min(count, len(present))
        ranked = sorted(present, key=lambda s: (s != cls, -score[s], s))
        chosen = sorted(ranked[:count])
        if self.schedule.importance == "as_released" and cls is not None and ratio < 1:
            chosen.remove(cls)
            chosen.insert(count // 2, cls)
        outcome.kept.append([line.places[slot] for slot in chosen])
        if self.schedule.alignment == "masked":
            gone = sorted(set(range(len(line.places))) - set(chosen))
            line.masked |= {line.places[slot] for slot in gone}
            line.hidden, line.residual = line.hidden.clone(), line.residual.clone()
            line.hidden[gone] = 0
            line.residual[gone] = 0
            return
        line.places = outcome.kept[-1]
        line.hidden, line.residual = line.hidden[chosen], line.residual[chosen]

    def _logits(self, line: Line) -> Tensor:
        x = self._norm(line.residual + line.hidden, "norm_f")
        weight, bias = self.state["head.weight"], self.state["head.bias"]
        if self._class_place is not None:
            return weight @ x[line.places.index(self._class_place)] + bias
        x = x[[slot for slot, place in enumerate(line.places) if place not in line.masked]]
        if self.config.pool == "max":
            return (x @ weight.T + bias).max(0).values
        return weight @ (x[-1] if self.config.pool == "last" else x.mean(0)) + bias
