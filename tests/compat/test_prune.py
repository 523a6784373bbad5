"""Pruning a model of the user's: the numbers of our own pruned Vim, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compat_cases import LanguageModel, MambaVisionLike, SlowPath, VimLike, built
from exports import MICRO
from official_data import fill_weights
from torch import Tensor, nn

import vssm
from vssm.compat.packages.blocks import Mamba
from vssm.errors import UnsupportedError

IMAGES = (2, 3, 48, 48)
RATIOS: dict[int, float] = {1: 0.7, 2: 0.8}


def _schedule(**rules: Any) -> vssm.PruneSchedule:
    return vssm.PruneSchedule(RATIOS, **rules)


def _theirs(**options: Any) -> nn.Module:
    return fill_weights(built(lambda: VimLike(**options)))


def _ours(**rules: Any) -> nn.Module:
    options = {**MICRO, "depth": 3, "bimamba": rules.pop("bimamba", "v2")}
    return fill_weights(vssm.create_model("vim_tiny", schedule=_schedule(**rules), **options))


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"alignment": "constant"},
        {"alignment": "none"},
        {"alignment": "none", "importance": "as_released"},
        {"importance": "l2", "gated": True},
        {"score_direction": "backward"},
        {"conv": "position"},
    ],
    ids=str,
)
def test_numbers_of_our_own_pruned_vim(rules: dict[str, Any]) -> None:
    x = torch.randn(IMAGES)
    ours = _ours(**rules).double().forward_details(x.double())
    pruned = vssm.prune(_theirs(), _schedule(**rules), x).double()
    theirs = pruned.forward_details(x.double())
    torch.testing.assert_close(theirs.logits, ours.logits, rtol=1e-10, atol=1e-12)
    for got, want in zip(theirs.kept_positions, ours.kept_positions, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("bimamba", ["v1", "none"])
def test_other_mixers(bimamba: str) -> None:
    x = torch.randn(IMAGES)
    ours = _ours(bimamba=bimamba).double().forward_details(x.double())
    pruned = vssm.prune(_theirs(bimamba=bimamba), _schedule(), x).double()
    torch.testing.assert_close(pruned(x.double()), ours.logits, rtol=1e-10, atol=1e-12)


class _Fork(Mamba):
    """A mixer that goes both ways and calls the attribute that says so otherwise."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, bimamba_type="v2", **options)
        self.bimamba = True
        del self.bimamba_type

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        self.bimamba_type = "v2"
        found = super().forward(hidden_states, inference_params)
        del self.bimamba_type
        return found


def test_mixer_is_known_by_its_weights() -> None:
    x, theirs = torch.randn(IMAGES), _theirs()
    want = vssm.prune(theirs, _schedule(), x)(x)
    for block in theirs.layers:
        mixer = _Fork(20, d_state=5)
        mixer.load_state_dict(block.mixer.state_dict())
        mixer.if_divide_out, block.mixer = True, mixer
    torch.testing.assert_close(vssm.prune(theirs, _schedule(), x)(x), want)


def test_model_stays_as_it_was_and_ratio_one_is_dense() -> None:
    x, model = torch.randn(IMAGES), _theirs()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pruned = vssm.prune(model, vssm.PruneSchedule({1: 1.0}), x)
    assert model.training
    assert not pruned.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k.removeprefix("model.") for k in pruned.state_dict()} == set(before)
    torch.testing.assert_close(pruned(x), model.eval()(x), rtol=1e-5, atol=1e-6)
    assert pruned.forward_details(x).kept_positions[0].shape == (2, 37)


def test_pruned_module_exports(tmp_path: Path) -> None:
    x = torch.randn(IMAGES)
    pruned = vssm.prune(_theirs(), _schedule(), x)
    artifact = vssm.export_module(pruned, x, tmp_path / "out")
    names = [output.name for output in artifact.manifest.outputs]
    assert names == ["logits", "kept_positions_0", "kept_positions_1"]
    schedule = artifact.manifest.schedule
    assert schedule is not None
    assert (schedule.num_keep, schedule.cls_position) == ((27, 21), 18)
    for model in (None, pruned):
        report = vssm.check_parity(model, artifact)
        assert report.passed, report.failures
        assert report.kept_agreement == [1.0, 1.0]


class _Between(VimLike):
    def between(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return hidden * 1.5, residual


class _Reversed(VimLike):
    def forward(self, images: Tensor) -> Tensor:
        layers, self.layers = self.layers, nn.ModuleList(reversed(self.layers))
        try:
            return super().forward(images)
        finally:
            self.layers = layers


class _Changed(Mamba):
    """A fork's mixer: the same weights, another function."""

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        return super().forward(hidden_states) * 1.01


class _Forked(VimLike):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1].mixer.__class__ = _Changed


def test_stacks_that_are_not_plain_are_refused() -> None:
    x = torch.randn(IMAGES)
    with pytest.raises(UnsupportedError, match="between blocks 1 and 2"):
        vssm.prune(built(_Between), _schedule(), x)
    with pytest.raises(UnsupportedError, match="block 3 runs after block 0"):
        vssm.prune(built(_Reversed), _schedule(), x)
    with pytest.raises(UnsupportedError, match=r"block 2 .*computes something else"):
        vssm.prune(built(_Forked), _schedule(), x)
    with pytest.raises(UnsupportedError, match=r"blocks='stages' is not a list.* which has layers"):
        vssm.prune(_theirs(), _schedule(), x, blocks="stages")
    stack = nn.Module()
    stack.layers = nn.ModuleList([built(MambaVisionLike)])
    stack.if_cls_token, stack.patch_embed = True, nn.Module()
    stack.patch_embed.num_patches = 4
    with pytest.raises(UnsupportedError, match="has no `norm` and `mixer`"):
        vssm.prune(stack, _schedule(), x)


class _Windows(nn.Module):
    """LocalVim's kind: each walk of the map has a convolution and weights of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ways = nn.ModuleList(SlowPath(width) for _ in range(3))
        columns = torch.arange(36).view(6, 6).t().flatten()
        windows = torch.arange(36).view(2, 3, 2, 3).transpose(1, 2).flatten()
        self.tables = [torch.arange(36), columns, windows]

    def forward(self, x: Tensor, inference_params: Any = None) -> Tensor:
        pairs = zip(self.ways, self.tables, strict=True)
        return sum((way(x[:, table])[:, table.argsort()] for way, table in pairs), x[..., :1])


class _Local(VimLike):
    def __init__(self) -> None:
        super().__init__(depth=2, mean=True)
        for layer in self.layers:
            layer.mixer = _Windows(20)

    def forward(self, images: Tensor) -> Tensor:
        hidden, residual = self.patch_embed.proj(images).flatten(2).transpose(1, 2), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return self.head((hidden + residual)[:, 0])


def test_walks_that_are_not_known_are_refused() -> None:
    x, model = torch.randn(IMAGES), built(_Local)
    message = r"block 1: its mixer \(_Windows\) runs 3 selective scans.*columns or windows.*dense"
    with pytest.raises(UnsupportedError, match=message):
        vssm.prune(model, vssm.PruneSchedule({1: 0.5}), x, cls_index=0)


class _Video(VimLike):
    """VideoMamba's kind: no attributes that say so, and the class token in front."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        residual = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return self.head(self.norm_f(hidden + residual)[:, 0])


def test_stack_without_attributes_prunes_at_the_place_given() -> None:
    x, theirs = torch.randn(IMAGES), fill_weights(built(_Video))
    del theirs.if_cls_token, theirs.use_middle_cls_token
    with pytest.raises(UnsupportedError, match=r"no if_cls_token .*give cls_index=PLACE"):
        vssm.prune(theirs, _schedule(), x)
    options = {**MICRO, "depth": 3, "class_token": "head"}
    ours = fill_weights(vssm.create_model("vim_tiny", schedule=_schedule(), **options))
    pruned = vssm.prune(theirs, _schedule(), x, cls_index=0).double()
    want = ours.double().forward_details(x.double())
    torch.testing.assert_close(pruned(x.double()), want.logits, rtol=1e-10, atol=1e-12)


def test_tokens_that_are_not_classified_by_one_are_refused() -> None:
    x = torch.randn(IMAGES)
    mean = _theirs(mean=True)
    with pytest.raises(UnsupportedError, match=r"if_cls_token.*cls_index=PLACE"):
        vssm.prune(mean, _schedule(), x)
    with pytest.raises(UnsupportedError, match="reads more than the token at cls_index=18"):
        vssm.prune(mean, _schedule(), x, cls_index=18)
    with pytest.raises(ValueError, match=r"cls_index=37 is outside \[0, 37\)"):
        vssm.prune(_theirs(), _schedule(), x, cls_index=37)
    with pytest.raises(UnsupportedError, match="reads more than"):
        vssm.prune(_theirs(), _schedule(), x, cls_index=3)
    tokens = torch.randint(30, (2, 11))
    with pytest.raises(UnsupportedError, match="reads more than"):
        vssm.prune(built(LanguageModel), _schedule(), tokens, cls_index=10)


def test_schedules_that_do_not_fit_are_refused() -> None:
    x = torch.randn(IMAGES)
    with pytest.raises(ValueError, match="block=4"):
        vssm.prune(_theirs(), vssm.PruneSchedule({4: 0.5}), x)
    with pytest.raises(UnsupportedError, match="PlainMamba's choice"):
        vssm.prune(_theirs(), _schedule(step_parameters="full"), x)
    with pytest.raises(UnsupportedError, match=r"merging needs to know .* its class token"):
        vssm.prune(_theirs(), vssm.MergeSchedule(3), x)
    with pytest.raises(UnsupportedError, match="backward scan"):
        vssm.prune(_theirs(bimamba="none"), _schedule(score_direction="backward"), x)
    pruned = vssm.prune(_theirs(), _schedule(), x)
    with pytest.raises(UnsupportedError, match="no cache"):
        pruned.model.layers[0](torch.zeros(1, 37, 20), inference_params={})
