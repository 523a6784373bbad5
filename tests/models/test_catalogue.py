"""What is known of the models without torch, against the models as they are built."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any, get_type_hints

import pytest

import vssm
from vssm.checkpoints.hub import hub_file
from vssm.models import model_from_config
from vssm.models.cost import figures_of
from vssm.models.registry import cards, check_options, families


@pytest.mark.parametrize("name", cards())
def test_figures_are_those_of_the_built_model(name: str) -> None:
    assert cards()[name].figures == figures_of(name)


@pytest.mark.parametrize("name", families())
def test_options_are_the_configurations_fields(name: str) -> None:
    family = families()[name]
    assert family.fields() == get_type_hints(family.classes()[1])


def test_official_checkpoints_can_be_asked_for() -> None:
    # Vim's authors publish no segmenter and no detector.
    found = {name: card.checkpoint for name, card in cards().items()}
    absent = {name for name, official in found.items() if official is None}
    assert absent == {n for n in found if n.startswith("vim_") and n.endswith(("ade20k", "coco"))}
    official = [one for one in found.values() if one is not None]
    assert len({one.address for one in official}) == len(official)
    for one in official:
        assert hub_file(one.address) is not None or one.address.startswith("https://github.com/")
        assert one.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", one.sha256)
    # A file holds at least the float32 weights.
    for name, one in found.items():
        if one is not None and one.megabytes is not None:
            assert one.megabytes * 1e6 > 3.98 * cards()[name].figures.parameters  # rounded


def test_torch_is_not_needed() -> None:
    code = (
        "import sys; from vssm.models import describe_models; describe_models();"
        "print(sorted({'torch', 'numpy', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("asked", "ours"),
    [
        (
            "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
            "tiny",
        ),
        ("vim_small_patch16_stride8_224_bimambav2_final_pool_mean", "small_stride8"),
        ("hustvl/Vim-tiny-midclstok", "tiny"),
        ("vim-base", "base"),
        ("vim_tinny", "tiny"),
        ("Vim_Tiny", "tiny"),
    ],
)
def test_a_foreign_name_names_ours(asked: str, ours: str) -> None:
    with pytest.raises(ValueError, match=rf"is not a model.*; did you mean 'vim_{ours}'"):
        vssm.create_model(asked)


def test_a_name_like_nothing_gets_the_list() -> None:
    with pytest.raises(ValueError, match=r"name='resnet50' is not a model \(`vssm models` lists"):
        vssm.create_model("resnet50")


@pytest.mark.parametrize(
    ("name", "option", "answer"),
    [
        ("vim_tiny", {"img_size": 384}, "it is called 'image_size' here"),
        ("vim_tiny", {"embed_dim": 192}, "it is called 'd_model' here"),
        ("vim_tiny", {"hidden_size": 192}, "it is called 'd_model' here"),
        ("groupmamba_tiny", {"embed_dims": [64]}, "it is called 'widths' here"),
        ("vmamba_tiny_s1l8", {"depth": 3}, "it is called 'depths' here"),
        ("vim_tiny", {"d_stat": 8}, "did you mean 'd_state'"),
        ("vim_tiny", {"pretrained": True}, r"vssm.load_checkpoint\(model, FILE\)"),
        ("vim_tiny", {"drop_path_rate": 0.1}, "leave it out"),
        ("vim_tiny", {"zzz": 1}, "its options are image_size, patch_size"),
    ],
)
def test_a_foreign_option_gets_an_answer(name: str, option: dict[str, Any], answer: str) -> None:
    (key,) = option
    with pytest.raises(ValueError, match=rf"{key}=.*{answer}"):
        vssm.create_model(name, **option)


def test_image_size_as_text() -> None:
    assert check_options("vim_tiny", {"image_size": "224x320"}) == {"image_size": (224, 320)}
    sizes = {"depth": 1, "d_model": 8, "image_size": "32x48"}
    assert model_from_config("vim_tiny", sizes).image_size == (32, 48)
    for text in ("224", "224x", "axb", "1x2x3", "-1x2", "²x3"):
        with pytest.raises(ValueError, match=r"image_size='.*' is not height x width"):
            check_options("vim_tiny", {"image_size": text})


def test_a_schedule_of_another_kind_is_named() -> None:
    with pytest.raises(TypeError, match=r"schedule=\{1: 0.7\} is not a schedule; write for"):
        vssm.create_model("vim_tiny", schedule={1: 0.7})  # type: ignore[arg-type]
