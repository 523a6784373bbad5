"""Unmodified upstream model files, from clones below VSSM_UPSTREAM: the official numbers, exports.

VSSM_UPSTREAM/{Vim, PlainMamba, VMamba, GroupMamba, mamba, MambaVision, mamba-minimal, VideoMamba}
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from official_data import fill_weights, fixture, images
from tolerances import relative_error
from torch import Tensor, nn

import vssm
from vssm.compat import selective_scan_tokens, upstream
from vssm.compat.exact import exact_outputs, set_eval
from vssm.compat.outputs import module_outputs
from vssm.compat.packages.context import UpstreamReport
from vssm.errors import UnsupportedError

ROOT = Path(os.environ.get("VSSM_UPSTREAM", ""))
VIM = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"


@contextmanager
def _repository(*folders: str) -> Iterator[UpstreamReport]:
    """Inside `upstream`, with these folders of VSSM_UPSTREAM first on the path."""
    if "VSSM_UPSTREAM" not in os.environ:
        pytest.skip("VSSM_UPSTREAM is not set: the folder that holds clones of the repositories")
    paths = [ROOT / folder for folder in folders]
    if absent := [str(path) for path in paths if not path.is_dir()]:
        pytest.skip(f"no clone in {', '.join(absent)}")
    before_path, before = list(sys.path), set(sys.modules)
    sys.path[:0] = map(str, paths)
    try:
        with warnings.catch_warnings(), upstream() as report:
            warnings.simplefilter("ignore")  # torch.cuda.amp's, of files that are not ours
            yield report
    finally:
        sys.path[:] = before_path
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith(str(ROOT)):
                del sys.modules[name]


class _PlainMamba(nn.Module):
    """What mmcls' ImageClassifier does with the backbone: mean over tokens, one linear layer."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Module()
        self.head.fc = nn.Linear(backbone.embed_dims, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head.fc(self.backbone(x)[-1][0].flatten(2).mean(2))


def _vim() -> nn.Module:
    import models_mamba

    return getattr(models_mamba, VIM)()


def _plain_mamba() -> nn.Module:
    from mmcls.plain_mamba_dev.models.plain_mamba.plain_mamba import PlainMamba

    return _PlainMamba(PlainMamba(arch="L1", drop_path_rate=0.0, final_norm=True))


def _vmamba() -> nn.Module:
    from models.vmamba import VSSM

    options: dict[str, Any] = {
        "depths": [2, 2, 8, 2],
        "dims": 96,
        "ssm_d_state": 1,
        "ssm_ratio": 1.0,
        "ssm_conv_bias": False,
        "forward_type": "v05_noz",
        "norm_layer": "ln2d",
        "downsample_version": "v3",
        "patchembed_version": "v2",
    }
    return VSSM(**options)


def _groupmamba() -> nn.Module:
    from models.groupmamba import groupmamba_tiny

    return groupmamba_tiny()


MODELS: dict[str, tuple[tuple[str, ...], Callable[[], nn.Module], str]] = {
    "Vim, our Mamba": (("Vim/vim",), _vim, "vim_tiny"),
    "Vim, its fork's Mamba": (("Vim/vim", "Vim/mamba-1p1p1"), _vim, "vim_tiny"),
    "PlainMamba": (("PlainMamba",), _plain_mamba, "plain_mamba_l1"),
    "VMamba": (("VMamba/classification",), _vmamba, "vmamba_tiny_s1l8"),
    "GroupMamba": (("GroupMamba/classification",), _groupmamba, "groupmamba_tiny"),
}


def _build(name: str) -> nn.Module:
    folders, factory, _ = MODELS[name]
    with _repository(*folders) as report:
        model = factory()
        assert report.provided
    for module in model.modules():
        module.eval = lambda: None  # mmcls' returns None: `fill_weights` must not chain it
    fill_weights(model)
    for module in model.modules():
        del module.eval
    set_eval(model)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_official_numbers(name: str) -> None:
    model, fixtures = _build(name), MODELS[name][2]
    got = exact_outputs(model, images(fixtures, batch=1), module_outputs()).outputs["logits"]
    want = torch.from_numpy(fixture(fixtures)["logits.f64"])[:1]
    assert relative_error(got, want) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_export_agrees_with_the_float64_module(name: str, tmp_path: Path) -> None:
    model, fixtures = _build(name), MODELS[name][2]
    artifact = vssm.export_module(model, images(fixtures), tmp_path / "out", name=fixtures)
    report = vssm.check_parity(None, artifact)
    assert report.passed, report.failures
    nodes = onnx.load(str(artifact.model_path)).graph.node
    scans = Counter(n.op_type for n in nodes if n.domain == "vssm")
    if fixtures == "vim_tiny":
        assert scans == {"GatedSelectiveScan": 24}
        ours = vssm.export(vssm.create_model("vim_tiny"), tmp_path / "ours", weights=False)
        assert len(nodes) <= 1.3 * len(onnx.load(str(ours.model_path)).graph.node)
    else:  # one a block; GroupMamba: one a group of channels, in 19 blocks and the class block
        blocks = {"plain_mamba_l1": 24, "vmamba_tiny_s1l8": 14, "groupmamba_tiny": 80}
        assert scans == {"SelectiveScan": blocks[fixtures]}


@pytest.mark.parametrize("name", ["Vim, our Mamba", "Vim, its fork's Mamba"])
def test_pruned_vim_is_ours(name: str) -> None:
    model = _build(name)
    data = fixture("pruned/vim_tiny_gap")
    x = images("vim_tiny", seed=int(data["input_seed"]))[:1]
    schedule = vssm.PruneSchedule({10: 0.8}, conv="compact")
    pruned = vssm.prune(model, schedule, x)
    found = exact_outputs(pruned, x, module_outputs(scores=True)).outputs
    assert relative_error(found["logits"], torch.from_numpy(data["logits"])[:1]) < 1e-9
    assert found["kept_positions_0"].tolist() == data["kept0"][:1].tolist()


def test_pruned_videomamba(tmp_path: Path) -> None:
    with _repository("VideoMamba/videomamba/image_sm/models", "VideoMamba/mamba"):
        from videomamba import VisionMamba

        torch.manual_seed(0)
        model = VisionMamba(img_size=64, depth=3, embed_dim=32, num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    with pytest.raises(UnsupportedError, match=r"if_cls_token.*cls_index"):
        vssm.prune(model, vssm.PruneSchedule({1: 0.7}), x)
    pruned = vssm.prune(model, vssm.PruneSchedule({1: 0.7, 2: 0.8}), x, cls_index=0)
    artifact = vssm.export_module(pruned, x, tmp_path / "out")
    assert vssm.check_parity(None, artifact).passed
    kept = pruned.forward_details(x).kept_positions
    assert [k.shape[1] for k in kept] == [13, 11]


def test_state_spaces_language_model(tmp_path: Path) -> None:
    with _repository("mamba"):
        from mamba_ssm.models.mixer_seq_simple import MixerModel

        torch.manual_seed(0)
        model = MixerModel(32, 2, 0, 50, rms_norm=True, fused_add_norm=True, residual_in_fp32=True)
    artifact = vssm.export_module(model, torch.randint(50, (2, 9)), tmp_path / "out")
    assert vssm.check_parity(None, artifact).passed


def test_mamba_minimal(tmp_path: Path) -> None:
    with _repository("mamba-minimal") as report:
        import model as minimal

        torch.manual_seed(0)
        net = minimal.Mamba(minimal.ModelArgs(d_model=16, n_layer=2, vocab_size=24))
        tokens = torch.randint(24, (2, 7))
        want = net(tokens)
        report.replace(
            minimal.MambaBlock, "selective_scan", lambda self, *o: selective_scan_tokens(*o)
        )
        torch.testing.assert_close(net(tokens), want, rtol=1e-4, atol=1e-5)
        artifact = vssm.export_module(net, tokens, tmp_path / "out")
    assert vssm.check_parity(None, artifact).passed


def test_mambavision_mixer(tmp_path: Path) -> None:
    with _repository("MambaVision"):
        from mambavision.models.mamba_vision import MambaVisionMixer

        torch.manual_seed(0)
        model = MambaVisionMixer(32, d_conv=3)
    artifact = vssm.export_module(model, torch.randn(2, 9, 32), tmp_path / "out")
    assert vssm.check_parity(None, artifact).passed
