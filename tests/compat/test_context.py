"""What `upstream` provides, what it patches, and that it leaves everything as it was."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compat_cases import CSMS6S

from vssm.compat import upstream
from vssm.compat.export import dry_run
from vssm.compat.packages import blocks, scan
from vssm.compat.packages.blocks import Mamba
from vssm.compat.packages.provided import Provided
from vssm.errors import UnsupportedError

INTERFACE = """
class Never:
    pass
def selective_scan_fn(u, *args, **kwargs):
    return "installed"
def mamba_inner_fn(*args, **kwargs):
    return "installed"
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of a test leave with it."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        # What torch brings on its first use stays: half of it twice would not fit together.
        if not name.startswith(("vssm", "torch", "sympy", "mpmath")):
            del sys.modules[name]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed mamba_ssm whose __init__ and norms need what is not there."""
    root = tmp_path / "mamba_ssm"
    for folder in ("", "ops", "modules", "ops/triton"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "__init__.py").write_text("")
    (root / "ops" / "selective_scan_interface.py").write_text(INTERFACE)
    (root / "ops" / "triton" / "layer_norm.py").write_text("import absent_triton\n")
    (root / "modules" / "mamba_simple.py").write_text(
        "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn\n"
        "class Mamba:\n"
        "    def run(self):\n"
        "        return selective_scan_fn\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return root


def test_what_is_absent_is_provided_and_gone_at_the_end() -> None:
    with upstream() as report:
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm import Mamba as Whole
        from mamba_ssm.modules.mamba_simple import Mamba as Simple
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.ops.triton.layernorm import RMSNorm
        from timm.models.layers import DropPath

        assert Whole is Simple is Mamba
        model = Whole(16)
        assert "timm.models.layers" in report.provided
        assert "mamba_ssm.modules.mamba_simple" in str(report)
    assert selective_scan_fn is scan.selective_scan_fn
    assert causal_conv1d_fn is blocks.causal_conv1d_fn
    assert RMSNorm(4)(torch.ones(1, 4)).shape == (1, 4)
    assert not [n for n in sys.modules if n.partition(".")[0] in {"mamba_ssm", "timm"}]
    assert model(torch.randn(1, 3, 16)).shape == (1, 3, 16)  # goes on working
    # Files may run their model as they are imported, in training mode.
    assert set(DropPath(0.5).train()(torch.ones(50)).tolist()) == {0.0, 2.0}
    assert DropPath(0.5).eval()(torch.ones(1)).item() == 1
    with pytest.raises(ModuleNotFoundError):
        import mamba_ssm  # noqa: F401


def test_the_scan_of_vmambas_first_package_has_no_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The clone's folder with its sources is no package, and hides none.
    (tmp_path / "selective_scan").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with upstream():
        from selective_scan import selective_scan_fn, selective_scan_ref
    assert selective_scan_fn is selective_scan_ref
    torch.manual_seed(0)
    u, delta, A, B = (
        torch.randn(1, 4, 3),
        torch.randn(1, 4, 3),
        -torch.rand(4, 2),
        torch.ones(1, 2, 3),
    )
    D, bias = torch.randn(4), torch.randn(4)
    want = scan.selective_scan_fn(u, delta, A, B, B, D, delta_bias=bias, delta_softplus=True)
    torch.testing.assert_close(selective_scan_fn(u, delta, A, B, B, D, bias, True, 2), want)


def test_unknown_names_say_what_is_there() -> None:
    with upstream():
        message = (
            r"interface\.mamba_chunk_scan \(asked for by [\w.]*test_context, line \d+\) is unk"
        )
        with pytest.raises(ImportError, match=message):
            from mamba_ssm.ops.selective_scan_interface import mamba_chunk_scan  # noqa: F401
        import mamba_ssm.ops.selective_scan_interface as interface

        with pytest.raises(AttributeError, match=r"stands in for.*docs/compat\.md"):
            interface.mamba_chunk_scan  # noqa: B018
        assert not hasattr(interface, "mamba_chunk_scan")
        with pytest.raises(ModuleNotFoundError):
            import mamba_ssm.ops.triton.chunk_state  # noqa: F401
        from mamba_ssm.modules.mamba3 import Mamba3

        with pytest.raises(
            UnsupportedError, match=r"called by [\w.]*test_context, line .*another recurrence"
        ):
            Mamba3(8)
        import selective_scan_cuda
        from timm.models.vision_transformer import VisionTransformer

        with pytest.raises(UnsupportedError, match="compiled CUDA"):
            selective_scan_cuda.fwd(1)
        with pytest.raises(UnsupportedError, match=r"timm.* is not installed; install it"):
            VisionTransformer()


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="prefer='theirs'"), upstream(prefer="theirs"):
        pass
    with upstream(), pytest.raises(ValueError, match="inside upstream"), upstream():
        pass


def test_own_files_of_an_installed_package_run_over_our_functions(installed: Path) -> None:
    with upstream() as report:
        from mamba_ssm import Mamba as Theirs

        assert Theirs is not Mamba
        assert Theirs().run() is scan.selective_scan_fn
    assert "mamba_ssm.modules.mamba_simple" in report.installed
    assert "mamba_ssm.ops.selective_scan_interface" in report.provided
    assert Theirs().run() is scan.selective_scan_fn
    from mamba_ssm.modules.mamba_simple import Mamba as Later

    assert Later().run()(None) == "installed"


def test_installed_is_preferred_where_it_works(installed: Path) -> None:
    with upstream(prefer="installed") as report:
        from mamba_ssm.modules.mamba_simple import Mamba as Theirs
        from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

        assert Theirs().run()(None) == "installed"
        assert rms_norm_fn(torch.ones(1, 2), torch.ones(2), None).shape == (1, 2)
    assert "mamba_ssm.ops.triton.layer_norm" in report.provided
    assert any("absent_triton" in note for note in report.notes)
    assert "mamba_ssm.ops.selective_scan_interface" not in report.provided


def test_names_bound_before_are_ours_inside_and_theirs_again(installed: Path) -> None:
    import mamba_ssm.modules.mamba_simple as simple
    import mamba_ssm.ops.selective_scan_interface as interface

    user = types.ModuleType("user_model")
    user.scan, user.Never = interface.selective_scan_fn, interface.Never
    sys.modules["user_model"] = user
    original = interface.selective_scan_fn
    with upstream() as report:
        assert simple.Mamba().run() is scan.selective_scan_fn
        assert user.scan is scan.selective_scan_fn
        assert user.Never is interface.Never
        assert interface.mamba_inner_fn is blocks.mamba_inner_fn
        assert "user_model.scan" in report.patched
    assert user.scan is simple.selective_scan_fn is interface.selective_scan_fn is original
    assert sys.modules["mamba_ssm.modules.mamba_simple"] is simple
    with pytest.raises(RuntimeError, match="stop"), upstream():
        raise RuntimeError("stop")
    assert user.scan is original


def test_scans_of_a_repository_are_replaced_when_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_csms6s.py").write_text(CSMS6S)
    (tmp_path / "own_model.py").write_text(
        "from own_csms6s import selective_scan_fn, cross_scan_fn"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with upstream() as report:
        import own_csms6s
        import own_model

        assert own_model.selective_scan_fn is own_csms6s.selective_scan_fn
    u, rows = torch.randn(1, 4, 5), torch.randn(1, 2, 2, 5)
    A = -torch.rand(4, 2)
    want = scan.selective_scan_fn(u, u, A, rows, rows, delta_softplus=True)
    found = own_model.selective_scan_fn(u, u, A, rows, rows)  # softplus is the default of its own
    torch.testing.assert_close(found, want)
    core = own_csms6s.SelectiveScanCore.apply(u, u, A, rows, rows, None, None, True, -1, -1, True)
    torch.testing.assert_close(core, want)
    assert own_csms6s.selective_scan_flop_jit(1, 2) == 0
    assert "own_csms6s.SelectiveScanCuda.apply" in report.patched
    assert own_model.cross_scan_fn(torch.ones(1, 1, 2, 2)).shape == (1, 4, 1, 4)


def test_walks_under_a_known_name_are_ours_only_if_they_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
import torch

class CrossScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
        xs = torch.stack([rows, columns], 1)
        return torch.cat([xs, {}], 1)

class CrossMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ys):
        return ys[:, :8].reshape(2, -1) * ys[:, 7].sum()
"""
    (tmp_path / "four_walks.py").write_text(text.format("xs.flip(-1)"))
    (tmp_path / "other_walks.py").write_text(text.format("xs.roll(1, -1)"))
    monkeypatch.syspath_prepend(str(tmp_path))
    with upstream() as report:
        import four_walks
        import other_walks
    assert "four_walks.CrossScan.apply" in report.patched
    assert not [name for name in report.patched if name.startswith("other_walks")]
    for note in ("other_walks.CrossScan", "four_walks.CrossMerge"):
        assert f"{note}.apply walks otherwise than VMamba's: left as it is" in report.notes
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert four_walks.CrossScan.apply(x)[0, 2, 0].tolist() == [5, 4, 3, 2, 1, 0]
    assert other_walks.CrossScan.apply(x)[0, 2, 0].tolist() == [5, 0, 1, 2, 3, 4]


def test_scans_imported_before_are_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "early_csms6s.py").write_text(CSMS6S)
    (tmp_path / "early_other.py").write_text("def selective_scan_fn(x, y):\n    return x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import early_csms6s
    import early_other

    core, function = early_csms6s.SelectiveScanCore, early_csms6s.selective_scan_fn
    code = function.__code__
    with upstream() as report:
        assert "apply" in vars(core)
        assert function.__code__ is not code
        assert early_other.selective_scan_fn(1, 2) == 1
    assert "early_other" not in str(report)
    assert "apply" not in vars(core)
    assert function.__code__ is code


def test_replace_and_its_end() -> None:
    class Own:
        def scan(self) -> int:
            return 1

    with upstream() as report:
        report.replace(Own, "scan", lambda self: 2)
        assert Own().scan() == 2
        assert any(name.endswith("Own.scan") for name in report.patched)
        with pytest.raises(AttributeError, match="to replace"):
            report.replace(Own, "scam", print)
    assert Own().scan() == 1


def test_absent_packages_in_their_old_and_new_paths() -> None:
    with upstream():
        from fvcore.nn import flop_count_table
        from mmengine.registry import HOOKS
        from mmengine.runner.checkpoint import load_checkpoint
        from thop import profile
        from timm.data import IMAGENET_DEFAULT_MEAN
        from timm.layers import PatchEmbed
        from timm.models import build_model_with_cfg, register_model
        from timm.models._registry import register_model as same
        from timm.models.layers import PatchEmbed as Older
        from timm.models.layers import drop_path
        from timm.models.layers.helpers import to_2tuple
        from timm.models.vision_transformer import PatchEmbed as Oldest
        from timm.optim import create_optimizer  # nothing of timm.optim is listed
        from torchvision.models import VisionTransformer

        assert not hasattr(sys.modules["timm"], "layers_of_another_release")
    assert PatchEmbed is Older is Oldest
    assert same is register_model
    assert to_2tuple(3) == (3, 3)
    assert len(IMAGENET_DEFAULT_MEAN) == 3
    assert HOOKS.register_module()(Oldest) is Oldest
    assert drop_path(torch.ones(1), 0.5).item() == 1
    for later in (flop_count_table, load_checkpoint, create_optimizer, profile, VisionTransformer):
        with pytest.raises(UnsupportedError, match="is not installed; install it"):
            later()
    patches = PatchEmbed(8, 4, 3, 6, norm_layer=torch.nn.LayerNorm)
    assert patches.num_patches == 4
    assert patches(torch.ones(1, 3, 8, 8)).shape == (1, 4, 6)
    with pytest.raises(ValueError, match="made for \\(8, 8\\)"):
        patches(torch.ones(1, 3, 8, 9))
    loose = PatchEmbed(8, 4, flatten=False, dynamic_img_pad=True)
    assert loose(torch.ones(1, 3, 9, 8)).shape == (1, 768, 3, 2)
    with pytest.raises(UnsupportedError, match="output_fmt"):
        PatchEmbed(output_fmt="NHWC")
    built = build_model_with_cfg(PatchEmbed, "patches", False, img_size=8, patch_size=4)
    assert built.num_patches == 4
    with pytest.raises(UnsupportedError, match="pretrained=True"):
        build_model_with_cfg(PatchEmbed, "patches", True)


def test_failures_that_the_code_catches_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hiding.py").write_text(
        "try:\n    import absent_kernels\nexcept Exception:\n    absent_kernels = None\n"
        "try:\n    from mamba_ssm.ops.selective_scan_interface import unheard_of\n"
        "except ImportError:\n    unheard_of = None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    said = r"no scan \(imports that failed before: absent_kernels \(hiding, line 2\), .*unheard_of"

    def fail_later() -> None:
        with upstream() as report:
            import hiding

            assert hiding.unheard_of is None
            assert len(report.missed) == 2
            raise UnsupportedError("no scan")

    with pytest.raises(UnsupportedError, match=said):
        fail_later()


def test_what_was_looked_at_and_left_is_named_where_no_scan_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def other(x: Any, dt: Any, A: Any, B: Any, C: Any, mode: str = "sum") -> Any:
        return x

    module = types.ModuleType("with_another_scan")
    module.other, other.__module__ = other, module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Like(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return module.other(x, x, x, x, x)

    with pytest.raises(UnsupportedError, match=r"with_another_scan\..*other does not"), upstream():
        dry_run(Like(), torch.randn(2, 3, 4))


def test_what_installed_packages_try_for_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trying-1.0.dist-info").mkdir()
    (tmp_path / "trying.py").write_text("try:\n    import absent_backend\nexcept ImportError: ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    with upstream() as report:
        import trying  # noqa: F401
    assert report.missed == []


def test_installed_packages_do_without_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "installed_one-1.dist-info").mkdir()
    (tmp_path / "installed_one.py").write_text(
        "import importlib.util\nhas = importlib.util.find_spec('torchvision') is not None\n"
    )
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "with_torchvision.py").write_text("from torchvision import ops\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path / "theirs"))
    with upstream():
        import with_torchvision

        assert with_torchvision.ops
        import installed_one

        assert not installed_one.has


def test_torch_sees_no_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with_triton.py").write_text(
        "import triton\nimport triton.language as tl\n"
        "@triton.jit\ndef kernel(x: tl.constexpr):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with upstream():
        import with_triton

        loaded = sys.modules.get("triton")
        assert loaded is None or not isinstance(loaded, Provided)
        with pytest.raises(UnsupportedError, match="Triton kernel kernel"):
            with_triton.kernel[(1,)](1)


COMPILES = """
from torch.utils.cpp_extension import load
kernel = load(name="their_kernel", sources=["absent.cpp", "absent.cu"], verbose=True)
def mix(k, v):
    return kernel.mix_forward(k.cuda(), v)
"""


def test_cuda_code_that_a_file_compiles_is_no_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import cpp_extension

    real = cpp_extension.load
    (tmp_path / "compiles.py").write_text(COMPILES)
    monkeypatch.syspath_prepend(str(tmp_path))
    with upstream() as report:
        import compiles

        message = r"their_kernel\.mix_forward \(called by compiles, line 5\).*no selective scan"
        with pytest.raises(UnsupportedError, match=message):
            compiles.mix(torch.ones(1), torch.ones(1))
        assert "their_kernel" in report.provided
        # Plain C++ is compiled, which fails here for want of the file.
        with pytest.raises((OSError, RuntimeError)):
            cpp_extension.load(name="plain", sources=[str(tmp_path / "absent.cpp")])
    assert cpp_extension.load is real


class SizesAsNumbers(torch.Tensor):
    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(s) for s in super().shape)


class Scaled(torch.Tensor):
    def twice(self) -> torch.Tensor:
        return self * 2


def test_tensors_that_only_spell_their_sizes_otherwise_are_plain() -> None:
    with upstream() as report:
        x = torch.ones(2, 3)
        assert SizesAsNumbers(x) is x
        assert type(Scaled(x)) is Scaled  # it can do more, which would be lost
    assert f"{__name__}.SizesAsNumbers.__new__" in report.patched
    assert f"{__name__}.Scaled.__new__" not in report.patched
    assert type(SizesAsNumbers(x)) is SizesAsNumbers


def test_a_gpu_that_the_code_names_is_the_cpu() -> None:
    with upstream():
        assert torch.ones(1).cuda().to("cuda:0").device.type == "cpu"
        assert torch.zeros(2, device="cuda").add(1).to(torch.device("cuda", 1)).sum() == 2
        assert torch.nn.Linear(2, 2, device="cuda").cuda().weight.device.type == "cpu"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(1, device="cuda:99")


def test_patches_of_mmcv_have_its_sizes_and_keys() -> None:
    with upstream():
        from mmcv.cnn.bricks.transformer import PatchEmbed

        embed = PatchEmbed(3, 8, kernel_size=4, stride=4, input_size=10, norm_cfg={"type": "LN"})
    tokens, size = embed(torch.randn(2, 3, 10, 10))
    assert (tokens.shape, size, embed.init_out_size) == ((2, 9, 8), (3, 3), (3, 3))
    assert {"projection.weight", "projection.bias", "norm.weight"} <= set(embed.state_dict())
    plain = PatchEmbed(3, 8, kernel_size=3, stride=2, padding=1, input_size=(9, 7))
    assert plain(torch.randn(1, 3, 9, 7))[1] == plain.init_out_size == (5, 4)
