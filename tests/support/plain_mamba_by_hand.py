"""Pruned PlainMamba, written a second time: image by image and place by place.

Every walk visits the whole grid: a kept place takes a step, a pruned place decays the state.
Nothing here runs the package: a model gives its weights and the tokens of its stem, a configuration
and a schedule their switches.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional
from vim_by_hand import Outcome

from vssm.models.plain_mamba import PlainMambaConfig
from vssm.pruning.schedule import PruneSchedule

RIGHT, LEFT, UP, DOWN = 1, 2, 3, 4


@dataclass(frozen=True)
class PlainMambaByHand:
    """A PlainMamba from its official state_dict in float64."""

    config: PlainMambaConfig
    state: dict[str, Tensor]
    schedule: PruneSchedule

    def run(self, tokens: Tensor) -> Outcome:
        """One image's tokens (places, d_model) after the stem, positions not yet added."""
        x = tokens + self.state["backbone.pos_embed"][0]
        places = list(range(len(x)))
        outcome = Outcome(x)
        for block in range(self.config.depth):
            prefix = f"backbone.layers.{block}."
            normed = self._norm(x, prefix + "norm", 1e-5)
            mixed, y, z = self._mix(normed, places, prefix + "mamba.")
            x = x + mixed
            if block in self.config.layers_with_dwconv:
                x = self._depthwise(x, places, prefix + "dw.")
            if block + 1 in self.schedule.ratios:
                slots = self._choose(y, z, Fraction(self.schedule.ratios[block + 1]), outcome)
                x, places = x[slots], [places[slot] for slot in slots]
                outcome.kept.append(places)
        features = self._norm(x, "backbone.ln1", 1e-6).sum(0) / len(places)
        outcome.logits = self.state["head.fc.weight"] @ features + self.state["head.fc.bias"]
        return outcome

    def _norm(self, x: Tensor, key: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.state[key + ".weight"] + self.state[key + ".bias"]

    def _on_grid(self, x: Tensor, places: list[int], kernel: Tensor) -> Tensor:
        """A depthwise convolution (channels, 1, side, side) of x among zeros, at every place."""
        height, width = self.config.grid
        table = x.new_zeros(height * width, x.shape[1])
        for row, place in zip(x, places, strict=True):
            table[place] = row
        reach = kernel.shape[-1] // 2
        rows = []
        for place in range(height * width):
            total = x.new_zeros(x.shape[1])
            for other in range(height * width):
                down = other // width - place // width
                right = other % width - place % width
                if abs(down) <= reach and abs(right) <= reach:
                    total = total + kernel[:, 0, down + reach, right + reach] * table[other]
            rows.append(total)
        return torch.stack(rows)

    def _depthwise(self, x: Tensor, places: list[int], prefix: str) -> Tensor:
        x = self._on_grid(x, places, self.state[prefix + "0.weight"])[places]
        mean, var = (self.state[f"{prefix}1.running_{name}"] for name in ("mean", "var"))
        x = (x - mean) / (var + 1e-5).sqrt()
        return functional.gelu(x * self.state[prefix + "1.weight"] + self.state[prefix + "1.bias"])

    def _mix(self, x: Tensor, places: list[int], prefix: str) -> tuple[Tensor, Tensor, Tensor]:
        """The mixer's output, its ungated scan and its gate's input, by token."""
        w = {
            name.removeprefix(prefix): value
            for name, value in self.state.items()
            if name.startswith(prefix)
        }
        part, z = (x @ w["in_proj.weight"].T + w["in_proj.bias"]).chunk(2, dim=-1)
        grid = self._on_grid(part, places, w["conv2d.weight"]) + w["conv2d.bias"]
        grid = grid * grid.sigmoid()
        source = grid if self.schedule.step_parameters == "full" else grid[places]
        rank, states = w["dt_proj.weight"].shape[1], w["A_log"].shape[1]
        dt, B, C = (source @ w["x_proj.weight"].T).split([rank, states, states], dim=-1)
        dt = functional.softplus(dt @ w["dt_proj.weight"].T + 2 * w["dt_proj.bias"])
        bias = w["conv2d.bias"]
        zero_token = (bias * bias.sigmoid()) @ w["x_proj.weight"].T[:, :rank]
        zero = functional.softplus(zero_token @ w["dt_proj.weight"].T + 2 * w["dt_proj.bias"])
        y = torch.zeros_like(part)
        for walk in self._walks():
            self._scan(walk, y, places, {**w, "u": grid, "dt": dt, "B": B, "C": C, "zero": zero})
        out = (y * z * z.sigmoid()) @ w["out_proj.weight"].T + w["out_proj.bias"]
        return out, y, z

    def _scan(
        self, walk: list[tuple[int, int]], y: Tensor, places: list[int], w: dict[str, Tensor]
    ) -> None:
        """One walk over every place; adds its outputs to y (tokens, d_inner)."""
        A = -torch.exp(w["A_log"])
        h = torch.zeros_like(A)
        slots = {place: slot for slot, place in enumerate(places)}
        passed = taken = 0
        for step, (place, move) in enumerate(walk):
            if place not in slots:
                passed += 1
                continue
            own = step if self.schedule.step_parameters == "full" else taken
            dt, u = w["dt"][own], w["u"][place]
            lost = {"gap": dt, "constant": w["zero"], "none": torch.zeros_like(dt)}
            for _ in range(passed):
                h = torch.exp(lost[self.schedule.alignment][:, None] * A) * h
            h = torch.exp(dt[:, None] * A) * h
            h = h + (dt * u)[:, None] * (w["B"][own] + w["direction_Bs"][move])
            y[slots[place]] += h @ w["C"][own] + w["D"] * u
            passed, taken = 0, taken + 1

    def _walks(self) -> list[list[tuple[int, int]]]:
        """(place, move that led there) of the four walks over the grid."""
        height, width = self.config.grid
        rows = [
            (row, column)
            for row in range(height)
            for column in (range(width) if row % 2 == 0 else reversed(range(width)))
        ]
        columns = [
            (row, column)
            for column in range(width)
            for row in (range(height) if column % 2 == 0 else reversed(range(height)))
        ]
        return [self._moves(cells) for cells in (rows, rows[::-1], columns, columns[::-1])]

    def _moves(self, cells: list[tuple[int, int]]) -> list[tuple[int, int]]:
        names = {(0, 1): RIGHT, (0, -1): LEFT, (-1, 0): UP, (1, 0): DOWN}
        moves = [0] + [
            names[row - before[0], column - before[1]]
            for before, (row, column) in itertools.pairwise(cells)
        ]
        width = self.config.grid[1]
        return [(r * width + c, move) for (r, c), move in zip(cells, moves, strict=True)]

    def _choose(self, y: Tensor, z: Tensor, ratio: Fraction, outcome: Outcome) -> list[int]:
        scored = y * z * z.sigmoid() if self.schedule.gated else y
        formula = {
            "clip": lambda v: v.clamp(min=0).mean(-1),
            "sum": lambda v: v.mean(-1),
            "l1": lambda v: v.abs().mean(-1),
            "l2": lambda v: (v * v).sum(-1).sqrt(),
        }[self.schedule.importance]
        score: list[float] = formula(scored).tolist()
        outcome.scores.append(score)
        count = math.ceil(ratio * len(score))
        ranked = sorted(range(len(score)), key=lambda slot: (-score[slot], slot))
        return sorted(ranked[:count])
