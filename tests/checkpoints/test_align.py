"""Files with exactly a model's tensors under other keys: taken and said, or the cause named."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from checkpoint_cases import Bare, Wrapped, assert_loaded, assert_refused, save, weights
from torch import nn
from torch.nn.utils import prune

import vssm
from vssm.checkpoints.load import load_checkpoint, save_safetensors

# Of torch.compile's own imports.
COMPILE = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def prefixed(prefix: str, state: dict) -> dict:
    return {f"{prefix}{key}": value for key, value in state.items()}


PREFIXES = [
    *("_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod.", "module.module."),
    *("model.", "net.", "vim.", "encoder.", "anything.at.all.", "backbone.", "_forward_module."),
    *("module.model.", "model._orig_mod.", "_fsdp_wrapped_module.", "model.backbone."),
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("make", [Bare, Wrapped])
def test_one_string_before_every_key_is_taken_off_and_said(tmp_path, prefix, make):
    model, state = make(), weights(make())
    report = load_checkpoint(model, save(prefixed(prefix, state), tmp_path / "a.pth"))
    assert_loaded(model, state)
    assert report.prefix_stripped == prefix
    assert repr(prefix) in str(report)


@pytest.mark.parametrize("first", ["backbone.", "vim.", "module.backbone."])
def test_a_prefix_of_all_but_the_head_is_taken_off(tmp_path, first):
    model, state = Bare(), weights(Bare())
    outer = "module." if first.startswith("module.") else ""
    renamed = {
        (f"{outer}{k}" if k.startswith("head") else f"{first}{k}"): v for k, v in state.items()
    }
    report = load_checkpoint(model, save({"state_dict": renamed}, tmp_path / "a.pth"))
    assert_loaded(model, state)
    assert report.prefix_stripped == first


@pytest.mark.parametrize(
    "part", ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
@pytest.mark.parametrize("outer", ["", "module.", "model."])
def test_parts_of_wrappers_inside_keys_are_taken_out_and_said(tmp_path, part, outer):
    model, state = Bare(), weights(Bare())
    renamed = {outer + re.sub(r"^(stem|norm)\.", rf"\1.{part}.", k): v for k, v in state.items()}
    report = load_checkpoint(model, save(renamed, tmp_path / "a.pth"))
    assert_loaded(model, state)
    assert (report.prefix_stripped, report.unwrapped) == (outer, (part,))
    assert part in str(report)


def test_parts_that_are_the_models_own_stay(tmp_path):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.norm = nn.LayerNorm(2)

    state = weights(Holder())
    for prefix in ("", "module.", "_orig_mod."):
        model = Holder()
        load_checkpoint(model, save(prefixed(prefix, state), tmp_path / "a.pth"))
        assert_loaded(model, state)


@COMPILE
def test_what_wrappers_save_themselves(tmp_path):
    """The state dicts of the wrappers, not our idea of them."""
    state = weights(Bare())
    inner = Bare()
    inner.load_state_dict(state)
    block = copy.deepcopy(inner)
    block.stem = torch.compile(block.stem)
    both = nn.DataParallel(torch.compile(copy.deepcopy(inner)))
    for wrapped in (
        torch.compile(inner),
        nn.DataParallel(inner),
        torch.optim.swa_utils.AveragedModel(inner),
        block,
        both,
        torch.compile(nn.DataParallel(inner)),
    ):
        model = Bare()
        load_checkpoint(model, save(wrapped.state_dict(), tmp_path / "a.pth"))
        assert_loaded(model, state)


@pytest.mark.parametrize(
    "counters",
    [
        {"n_averaged": torch.tensor(3)},
        {"epoch": torch.tensor(7)},
        {"global_step": torch.tensor(7.0)},
        {"total_ops": torch.zeros(1), "total_params": torch.zeros(1)},
        {"stem.total_ops": torch.zeros(1).double(), "head.total_params": torch.zeros(1).double()},
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_counters_among_the_weights_are_left_out_and_said(tmp_path, counters, prefix):
    model, state = Bare(), weights(Bare())
    path = save({**counters, **prefixed(prefix, state)}, tmp_path / "a.pth")
    report = load_checkpoint(model, path)
    assert_loaded(model, state)
    assert set(report.ignored) == set(counters)
    save_safetensors({**prefixed(prefix, state), **counters}, tmp_path / "a.safetensors")
    load_checkpoint(model, tmp_path / "a.safetensors")
    assert_loaded(model, state)
    inside = {prefix + k: v for k, v in counters.items()}
    load_checkpoint(model, save({**prefixed(prefix, state), **inside}, tmp_path / "a.pth"))
    assert_loaded(model, state)


def test_a_weight_of_a_counters_name_is_no_counter(tmp_path):
    state = {**weights(Bare()), "total_ops": torch.ones(5)}
    assert_refused(Bare(), save(state, tmp_path / "a.pth"), "total_ops")


def test_the_keys_of_a_real_model(tmp_path):
    model, other = (
        vssm.create_model("vmamba_tiny_s1l8", num_classes=3, depths=(2, 1, 1, 1)) for _ in range(2)
    )
    state = {k: v + 1 for k, v in other.state_dict().items()}
    renamed = {
        f"module.net.{k}".replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in state.items()
    }
    report = load_checkpoint(model, save({"net": renamed, "epoch": 1}, tmp_path / "a.pth"))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert (report.wrapper, report.prefix_stripped) == ("net", "module.net.")
    assert report.unwrapped == ("_orig_mod",)


# What stays refused, and why


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "student.net."])
def test_with_and_without_a_prefix(tmp_path, prefix):
    state = weights(Bare())
    path = save({**state, **prefixed(prefix, state)}, tmp_path / "a.pth")
    assert_refused(Bare(), path, "with and without", prefix, "--key")
    report = load_checkpoint(model := Bare(), path, key=prefix.rstrip("."))
    assert_loaded(model, state)
    assert report.wrapper == prefix.rstrip(".")


@pytest.mark.parametrize("outer", ["", "model."])
def test_a_student_beside_its_teacher(tmp_path, outer):
    student, teacher = weights(Bare(), 1), weights(Bare(), 2)
    state = prefixed(f"{outer}student.", student) | prefixed(f"{outer}teacher.module.", teacher)
    path = save({"state_dict": state}, tmp_path / "a.pth")
    assert_refused(Bare(), path, "several sets", f"{outer}student and {outer}teacher", "--key")
    for name, expected in (("student", student), ("teacher", teacher)):
        model = Bare()
        load_checkpoint(model, path, key=f"state_dict.{outer}{name}")
        assert_loaded(model, expected)


def test_a_file_without_its_head_beside_others(tmp_path):
    state = {k: v for k, v in weights(Bare()).items() if not k.startswith("head")}
    content = {**prefixed("encoder.", state), "decoder.weight": torch.ones(5)}
    path = save(content, tmp_path / "a.pth")
    assert_refused(Bare(), path, "'encoder'", "decoder.weight", "key='encoder'")
    assert_refused(Bare(), path, "missing: head.weight", "--new-head", key="encoder")
    load_checkpoint(Bare(), path, key="encoder", new_head=True)


def test_a_model_beside_a_loss_of_its_own(tmp_path):
    state = weights(Bare())
    content = {**prefixed("model.", state), "criterion.weight": torch.ones(5)}
    path = save({"state_dict": content}, tmp_path / "a.pth")
    assert_refused(Bare(), path, "'model'", "criterion.weight", "key='model'")
    load_checkpoint(model := Bare(), path, key="state_dict.model")
    assert_loaded(model, state)


def test_a_misfit_says_what_was_taken_off(tmp_path):
    state = weights(Bare())
    del state["head.bias"]
    path = save(prefixed("model.", state), tmp_path / "a.pth")
    assert_refused(Bare(), path, "begin with 'model.'", "missing: head.bias", "num_classes")


def test_many_more_tensors_than_the_model_has(tmp_path):
    path = save({f"a.{i}": torch.ones(1) for i in range(5000)}, tmp_path / "a.pth")
    assert_refused(Bare(), path, "5,000 tensors", "--key")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: nn.utils.parametrizations.weight_norm(m.head),
            ("parametrisation", "remove_parametrizations"),
        ),
        (
            lambda m: prune.l1_unstructured(m.head, "weight", 0.5),
            ("pruning", "prune.remove"),
        ),
        (
            lambda m: nn.utils.parametrizations.spectral_norm(m.stem),
            ("parametrisation", "remove_parametrizations"),
        ),
    ],
)
def test_weights_that_something_replaced(tmp_path, change, words):
    model = Bare()
    change(model)
    assert_refused(Bare(), save(model.state_dict(), tmp_path / "a.pth"), *words)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("head.weight_g", "head.weight_v"), ("weight_norm", "remove_weight_norm")),
        (("head.base_layer.weight", "head.lora_A.default.weight"), ("LoRA", "merge_and_unload")),
        (("_flat_param",), ("FSDP", "full_state_dict")),
    ],
)
def test_keys_of_what_replaces_weights(tmp_path, keys, words):
    state = weights(Bare())
    del state["head.weight"]
    path = save(state | dict.fromkeys(keys, torch.ones(2)), tmp_path / "a.pth")
    assert_refused(Bare(), path, *words)


@COMPILE
def test_a_wrapped_model_is_handed_back(tmp_path):
    path = save(weights(Bare()), tmp_path / "a.pth")
    with pytest.raises(TypeError, match=r"DataParallel is a wrapper.*pass model\.module"):
        load_checkpoint(nn.DataParallel(Bare()), path)
    with pytest.raises(TypeError, match=r"OptimizedModule .*pass model\._orig_mod"):
        load_checkpoint(torch.compile(Bare()), path)


# A new head


def test_a_head_of_another_width_only_where_asked(tmp_path):
    state = weights(Bare())
    state |= {"head.weight": torch.ones(1000, 4), "head.bias": torch.ones(1000)}
    path = save({"model": prefixed("module.", state)}, tmp_path / "a.pth")
    message = assert_refused(Bare(), path, "head.weight (file (1000, 4), model (5, 4))")
    assert "num_classes" in message
    assert "--new-head" in message
    model = Bare()
    own = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("head")}
    report = load_checkpoint(model, path, new_head=True)
    assert_loaded(model, {**state, **own})
    assert report.num_tensors == len(state) - 2
    assert "head.weight (5, 4) stays the model's own" in str(report)
    assert "(1000, 4), left out" in str(report)


def test_a_file_without_a_head(tmp_path):
    state = {k: v for k, v in weights(Wrapped()).items() if not k.startswith("head")}
    path = save(state, tmp_path / "a.pth")
    assert_refused(Wrapped(), path, "missing: head.fc.weight, head.fc.bias", "--new-head")
    report = load_checkpoint(Wrapped(), path, new_head=True)
    assert "the file has none" in str(report)


def test_a_new_head_lets_nothing_else_pass(tmp_path):
    state = weights(Bare())
    assert_refused(Bare(), save(state, tmp_path / "a.pth"), "leave it out", new_head=True)
    state["head.weight"] = torch.ones(5, 7)  # other features, not other classes
    assert_refused(Bare(), save(state, tmp_path / "a.pth"), "head.weight", new_head=True)
    state["head.weight"], state["stem.bias"] = torch.ones(9, 4), torch.ones(9)
    assert_refused(Bare(), save(state, tmp_path / "a.pth"), "stem.bias", new_head=True)


@pytest.mark.parametrize(
    "name", ["vim_tiny", "plain_mamba_l1", "groupmamba_tiny", "vmamba_tiny_s1l8"]
)
def test_the_head_of_every_family(tmp_path, name):
    flat = name in {"vim_tiny", "plain_mamba_l1"}
    small = {"depth": 2} if flat else {"depths": (1, 1, 1, 1)}
    wide = vssm.create_model(name, num_classes=20, **small)
    path = save(wide.state_dict(), tmp_path / "a.pth")
    model = vssm.create_model(name, num_classes=3, **small)
    assert_refused(model, path, "--new-head")
    report = load_checkpoint(model, path, new_head=True)
    assert len(report.new_head) == (4 if name == "groupmamba_tiny" else 2)


def test_a_model_is_told_what_was_loaded(tmp_path):
    wide = vssm.create_model("vim_tiny", num_classes=20, depth=1)
    path = save({"net": prefixed("model.", wide.state_dict())}, tmp_path / "a.pth")
    model = vssm.create_model("vim_tiny", num_classes=3, depth=1)
    assert model.loaded is None
    report = load_checkpoint(model, path, new_head=True)
    assert model.loaded == str(report)
    assert "'model.' stripped" in model.loaded
    assert model.checkpoint.sha256 == report.sha256
    save_safetensors(
        wide.state_dict(), tmp_path / "a.safetensors", labels=[str(i) for i in range(20)]
    )
    load_checkpoint(model, tmp_path / "a.safetensors", new_head=True)
    assert model.labels is None  # they are the old head's
    load_checkpoint(wide, tmp_path / "a.safetensors")
    assert wide.labels[3] == "3"
