"""Models that something stands around or inside are handed back with the way out of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import vssm

COMPILE = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
OLD = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def small() -> nn.Module:
    return vssm.create_model("vim_tiny", depth=1, d_model=16, image_size=32, num_classes=2)


class Adapter(nn.Module):
    """A linear layer as LoRA's packages leave it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 1, bias=False)
        self.lora_B = nn.Linear(1, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def adapted(model: nn.Module) -> None:
    model.head = Adapter(model.head)


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(model.head, "weight", 0.5)


def old_weight_norm(model: nn.Module) -> None:
    nn.utils.weight_norm(model.head)


def compiled_block(model: nn.Module) -> None:
    model.layers[0] = torch.compile(model.layers[0])


WRAPPERS = {
    "module": [nn.DataParallel, torch.optim.swa_utils.AveragedModel],
    "_orig_mod": [torch.compile],
}


@COMPILE
@pytest.mark.parametrize(
    ("wrap", "part"), [(wrap, part) for part, some in WRAPPERS.items() for wrap in some]
)
def test_a_wrapper_around_the_model(tmp_path, wrap, part):
    wrapped = wrap(small())
    with pytest.raises(TypeError, match=rf"is a wrapper around the model; pass model\.{part}$"):
        vssm.export(wrapped, tmp_path / "out")
    with pytest.raises(TypeError, match=rf"pass model\.{part}$"):
        vssm.export_module(wrapped, torch.zeros(1, 3, 32, 32), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@OLD
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: parametrizations.weight_norm(m.head), "remove_parametrizations"),
        (lambda m: parametrizations.orthogonal(m.head), "remove_parametrizations"),
        (lambda m: parametrizations.spectral_norm(m.patch_embed.proj), "remove_parametrizations"),
        (old_weight_norm, "remove_weight_norm"),
        (lambda m: nn.utils.spectral_norm(m.head), "remove_spectral_norm"),
        (pruned, r"prune\.remove"),
        (adapted, "merge_and_unload"),
        (compiled_block, r"layers\.0 is wrapped in OptimizedModule; put layers\.0\._orig_mod"),
    ],
)
def test_what_stands_in_place_of_weights(tmp_path, change, words):
    model = small()
    change(model)
    with pytest.raises(ValueError, match=words):
        vssm.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@OLD
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_packed_weights(tmp_path):
    model = small()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    with pytest.raises(ValueError, match=r"packed weights.*export the float model"):
        vssm.export(quantised, tmp_path / "out")
    with pytest.raises(ValueError, match=r"packed weights.*export the float model"):
        vssm.export_module(quantised, torch.zeros(1, 3, 32, 32), tmp_path / "out")
    state = {"model": quantised.state_dict()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(Exception, match=r"_packed_params.* is a "):
        vssm.load_checkpoint(model, tmp_path / "a.pth")
