"""Checkpoints of every official form into models, and every way in which one can misfit."""

from __future__ import annotations

import argparse
import hashlib

import pytest
import torch
from checkpoint_cases import (
    LEGACY,
    Bare,
    Hook,
    Wrapped,
    assert_loaded,
    assert_refused,
    save,
    weights,
)
from torch import nn

from vssm.checkpoints.formats import read_file
from vssm.checkpoints.load import load_checkpoint, save_safetensors


class Config(dict):
    """Stands for yacs' CfgNode: a dict subclass with attributes that torch.load refuses."""

    def __init__(self, **values):
        super().__init__(values)
        self.frozen = True


def vim_file(state) -> dict[str, object]:
    """What Vim's and DeiT's training code saves."""
    return {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "lr_scheduler": {},
        "epoch": 299,
        "model_ema": {k: v + 1 for k, v in state.items()},
        "scaler": {"scale": 1.0},
        "args": argparse.Namespace(lr=0.1, model="vim"),
    }


# Every official form


@LEGACY
def test_vim_file(tmp_path, legacy):
    model, state = Bare(), weights(Bare())
    path = save(vim_file(state), tmp_path / "a.pth", legacy=legacy)
    report = load_checkpoint(model, path)
    assert_loaded(model, state)
    assert (report.format, report.wrapper, report.weights) == ("torch", "model", "model")
    assert report.num_tensors == len(state)
    assert set(report.ignored) == set(vim_file(state)) - {"model"}
    assert report.stubs == ("argparse.Namespace",)
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(path) in str(report)


@LEGACY
def test_ema_only_by_choice(tmp_path, legacy):
    model, state = Bare(), weights(Bare())
    path = save(vim_file(state), tmp_path / "a.pth", legacy=legacy)
    report = load_checkpoint(model, path, weights="ema")
    assert report.wrapper == "model_ema"
    assert_loaded(model, {k: v + 1 for k, v in state.items()})
    save({"model_ema": state}, path, legacy=legacy)
    assert_refused(model, path, "model_ema", "weights='ema'")
    save({"model": state}, path, legacy=legacy)
    assert_refused(model, path, "model_ema", "weights='model'", weights="ema")
    with pytest.raises(ValueError, match="weights='best'"):
        load_checkpoint(model, path, weights="best")


@LEGACY
def test_mmcv_file(tmp_path, legacy):
    model, state = Wrapped(), weights(Wrapped())
    ema = {f"ema_{key.replace('.', '_')}": value + 1 for key, value in state.items()}
    content = {"meta": {"hooks": [Hook()], "epoch": 300}, "state_dict": {**state, **ema}}
    report = load_checkpoint(model, save(content, tmp_path / "a.pth", legacy=legacy))
    assert_loaded(model, state)
    assert report.wrapper == "state_dict"
    assert set(report.ignored) == {"meta", *ema}
    assert report.stubs == (f"{Hook.__module__}.Hook",)


@LEGACY
def test_vmamba_file_with_a_yacs_object(tmp_path, legacy):
    model, state = Bare(), weights(Bare())
    content = {"model": state, "config": Config(A=Config(B=1)), "epoch": 1, "max_accuracy": 82.6}
    report = load_checkpoint(model, save(content, tmp_path / "a.pth", legacy=legacy))
    assert_loaded(model, state)
    assert report.stubs == (f"{Config.__module__}.Config",)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ""])
def test_safetensors_is_told_by_content(tmp_path, suffix):
    model, state = Bare(), weights(Bare())
    save_safetensors(state, tmp_path / f"a{suffix}")
    report = load_checkpoint(model, tmp_path / f"a{suffix}")
    assert_loaded(model, state)
    assert (report.format, report.wrapper) == ("safetensors", "")
    assert_refused(model, tmp_path / f"a{suffix}", "ema", weights="ema")


def test_bare_dictionary_with_metadata_beside(tmp_path):
    model, state = Bare(), weights(Bare())
    report = load_checkpoint(model, save({**state, "epoch": 3}, tmp_path / "a.pth"))
    assert_loaded(model, state)
    assert (report.wrapper, report.ignored) == ("", ("epoch",))
    assert_refused(model, save({**state, "size": 3}, tmp_path / "a.pth"), "'size'", "int")


def test_state_dict_object_with_metadata_attribute(tmp_path):
    weights = Bare()
    model = Bare()
    load_checkpoint(model, save({"model": weights.state_dict(), "x": Hook()}, tmp_path / "a.pth"))
    assert_loaded(model, weights.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "module.module."])
def test_module_prefix(tmp_path, prefix):
    model, state = Bare(), weights(Bare())
    path = save({f"{prefix}{k}": v for k, v in state.items()}, tmp_path / "a.pth")
    assert load_checkpoint(model, path).prefix_stripped == prefix
    assert_loaded(model, state)


def test_backbone_prefix_is_stripped_where_the_model_has_none(tmp_path):
    model, state = Bare(), weights(Bare())
    renamed = {k if k.startswith("head") else f"backbone.{k}": v for k, v in state.items()}
    report = load_checkpoint(model, save({"state_dict": renamed}, tmp_path / "a.pth"))
    assert (report.prefix_stripped, report.prefix_added) == ("backbone.", "")
    assert_loaded(model, state)


def test_backbone_prefix_is_added_where_the_model_has_one(tmp_path):
    model, state = Wrapped(), weights(Wrapped())
    bare = {f"module.{k.removeprefix('backbone.')}": v for k, v in state.items()}
    report = load_checkpoint(model, save(bare, tmp_path / "a.pth"))
    assert (report.prefix_stripped, report.prefix_added) == ("module.", "backbone.")
    assert_loaded(model, state)


def test_the_same_key_twice_is_refused(tmp_path):
    state = weights(Bare())
    state["backbone.head.bias"] = state["head.bias"] + 1
    path = save(state, tmp_path / "a.pth")
    assert_refused(Bare(), path, "head.bias", "with and without")


def test_two_state_dicts_are_refused(tmp_path):
    path = save({"model": weights(Bare()), "state_dict": weights(Bare(), 2)}, tmp_path / "a.pth")
    assert_refused(Bare(), path, "model and state_dict")


def test_a_read_file_keeps_the_files_keys(tmp_path):
    state = {f"module.{k}": v for k, v in weights(Bare()).items()}
    got = read_file(save({"model": state}, tmp_path / "a.pth")).state
    assert list(got) == list(state)
    assert all(torch.equal(got[k], v) and not got[k].requires_grad for k, v in state.items())


def test_the_models_attribute_names_the_file(tmp_path):
    model = Bare()
    model.checkpoint = None
    path = save(weights(model), tmp_path / "a.pth")
    report = load_checkpoint(model, path)
    assert (model.checkpoint.file, model.checkpoint.sha256) == ("a.pth", report.sha256)
    assert not hasattr(Bare(), "checkpoint")


# Dtypes and values


@pytest.mark.parametrize(
    ("stored", "target", "change"),
    [
        (torch.float16, torch.float32, "float16 to float32, exact"),
        (torch.bfloat16, torch.float32, "bfloat16 to float32, exact"),
        (torch.float32, torch.float64, "float32 to float64, exact"),
        (torch.float64, torch.float32, "float64 to float32, rounded"),
        (torch.float32, torch.float16, "float32 to float16, rounded"),
        (torch.int16, torch.float32, "int16 to float32, exact"),
    ],
)
def test_casts_are_reported(tmp_path, stored, target, change):
    model = nn.Linear(3, 2).to(target)
    state = {"weight": torch.tensor([[1 / 3] * 3] * 2) * 100, "bias": torch.tensor([1.0, 2.0])}
    state = {k: v.double().add(1e-9).to(stored) for k, v in state.items()}
    report = load_checkpoint(model, save(state, tmp_path / "a.pth"))
    assert_loaded(model, {k: v.to(target) for k, v in state.items()})
    assert any(change in cast for cast in report.casts)
    assert not load_checkpoint(model, save(model.state_dict(), tmp_path / "a.pth")).casts


@pytest.mark.parametrize("stored", [torch.int8, torch.uint8, torch.bool])
def test_weights_of_8_bits_are_refused(tmp_path, stored):
    """Without the scales that they were divided by they would be other weights."""
    state = weights(Bare())
    state["head.weight"] = state["head.weight"].to(stored)
    assert_refused(Bare(), save(state, tmp_path / "a.pth"), f"head.weight: {stored}", "scales")


def test_a_count_stored_as_a_fraction_is_refused(tmp_path):
    state = weights(Bare())
    state["norm.num_batches_tracked"] = torch.tensor(7.0)
    report = load_checkpoint(Bare(), save(state, tmp_path / "a.pth"))
    assert report.casts == ("1 float32 to int64, exact",)
    state["norm.num_batches_tracked"] = torch.tensor(7.5)
    assert_refused(Bare(), save(state, tmp_path / "a.pth"), "norm.num_batches_tracked")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300, 1j])
def test_values_that_are_no_weights_are_refused(tmp_path, bad):
    state = weights(Bare())
    dtype = torch.complex64 if isinstance(bad, complex) else torch.float64
    state["head.bias"] = state["head.bias"].to(dtype)
    state["head.bias"][2] = bad
    assert_refused(Bare(), save(state, tmp_path / "a.pth"), "head.bias")


def test_tensors_without_plain_data_are_refused(tmp_path):
    state = weights(Bare())
    for tensor in (torch.ones(5).to_sparse(), torch.ones(5, device="meta")):
        state["head.bias"] = tensor
        assert_refused(Bare(), save(state, tmp_path / "a.pth"), "head.bias")


# Keys and shapes


def test_every_kind_of_misfit_in_one_message(tmp_path):
    state = weights(Bare())
    del state["head.bias"], state["stem.weight"]
    state["fc.bias"] = torch.ones(2)
    state["head.weight"] = torch.ones(10, 4)
    path = save(state, tmp_path / "a.pth")
    message = assert_refused(Bare(), path, "missing: stem.weight, head.bias", "unexpected: fc.bias")
    assert "head.weight (file (10, 4), model (5, 4))" in message
    assert "num_classes" in message


def test_long_lists_are_cut_with_their_count(tmp_path):
    path = save({f"extra{i}": torch.ones(1) for i in range(50)}, tmp_path / "a.pth")
    message = assert_refused(Bare(), path, "extra5, ... (50 in all)")
    assert "extra6" not in message


def test_adapt_state_dict_may_rename_and_resize(tmp_path):
    class Adapting(Bare):
        def adapt_state_dict(self, state):
            if state["pos_embed"].shape[1] % 2 == 0:
                raise ValueError("pos_embed is no square; use another file")
            return {**state, "pos_embed": state["pos_embed"][:, :9]}

    state = weights(Bare())
    report = load_checkpoint(Adapting(), save(state, tmp_path / "a.pth"))
    assert report.adapted == ()
    state["pos_embed"] = torch.ones(1, 25, 4)
    model = Adapting()
    report = load_checkpoint(model, save(state, tmp_path / "a.pth"))
    assert report.adapted == ("pos_embed",)
    assert torch.equal(model.pos_embed, torch.ones(1, 9, 4))
    state["pos_embed"] = torch.ones(1, 24, 4)
    assert_refused(Adapting(), save(state, tmp_path / "a.pth"), "no square")
    assert_refused(Bare(), tmp_path / "a.pth", "pos_embed (file (1, 24, 4), model (1, 9, 4))")
