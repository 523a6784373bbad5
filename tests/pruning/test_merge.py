"""Token merging against the official code, its counts, and what is refused with which remedy."""

from __future__ import annotations

import fill
import numpy as np
import pytest
import torch
from exports import MICRO_PLAIN, micro
from official_data import fill_weights, filled_model, fixture, manifest
from tolerances import relative_error

import vssm
from vssm import MergeSchedule, PruneSchedule
from vssm.errors import UnsupportedError
from vssm.models.cost import count
from vssm.models.vim import Vim, VimConfig
from vssm.ops import reference
from vssm.pruning.schedule import TokenLayout, plan_stages
from vssm.training.recipe import Recipe
from vssm.training.request import FinetuneRequest, ModelSource

VIM = TokenLayout(seqlen=197, cls_index=98, keep_odd=True)
MICRO_CASES = manifest("micro_r_meeto")["cases"]


def _official(case: dict) -> MergeSchedule:
    """The schedule of an official configuration."""
    return MergeSchedule(
        case["num_prune"],
        every=case["merge_interval"],
        start=1 if case["if_merge_odd"] else case["merge_interval"],
        metric={"X": "hidden"}.get(case["metric"], case["metric"]),
        distance=case["distance"],
        order=case["if_order"],
        # What the code subtracts is written for 197 tokens; below, no merge can reach it.
        final_tokens=197 - 11 * case["compare"],
        choose={"max": 1, "3c": 3}[case["choose"]],
        mode="drop" if case["if_prune"] else case["merge_mode"],
    )


def _micro(case: dict) -> Vim:
    config = VimConfig(image_size=case["img_size"], d_model=48, depth=6, num_classes=11)
    return fill_weights(Vim(config, _official(case)))


def _input(document: dict) -> torch.Tensor:
    shape, key = document["input"]["shape"], document["input"]["key"]
    return torch.from_numpy(fill.make_input(tuple(shape), key=key)).double()


def _assert_as_fixture(model: Vim, x: torch.Tensor, arrays: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
        found = model.double().forward_details(x)
    assert len(found.merged) == len(arrays["r"])
    for i, (source, joined) in enumerate(found.merged):
        np.testing.assert_array_equal(source, arrays[f"src{i}"])
        np.testing.assert_array_equal(joined, arrays[f"dst{i}"])
        np.testing.assert_array_equal(found.merges[i].size.float(), arrays[f"size{i}"])
    stages = list(model.stages.values())
    places = [model.layout.cls_index, *(stage.next_cls_index for stage in stages)]
    assert places == arrays["cls_position"].tolist()
    assert [stages[0].seqlen, *(s.num_keep for s in stages)] == arrays["tokens"].tolist()
    assert relative_error(found.logits, arrays["logits.f64"]) <= 1e-9  # measured 1.3e-15


def _arrays(file: str, case: str) -> dict[str, np.ndarray]:
    found = fixture(file).items()
    return {k.removeprefix(f"{case}/"): v for k, v in found if k.startswith(f"{case}/")}


@pytest.mark.parametrize("case", MICRO_CASES)
def test_official_switches(case):
    model = _micro(MICRO_CASES[case])
    assert sorted(model.state_dict()) == manifest("micro_r_meeto")["keys"]
    _assert_as_fixture(model, _input(MICRO_CASES[case]), _arrays("micro_r_meeto", case))


@pytest.mark.slow
def test_official_model():
    x = torch.from_numpy(fill.make_input((2, 3, 224, 224), key="input_r_meeto")).double()
    model = filled_model("vim_tiny", schedule=MergeSchedule(5))
    _assert_as_fixture(model, x, _arrays("r_meeto", "vim_tiny_r5"))


def test_float32_agrees_with_float64():
    case = MICRO_CASES["uniform"]
    model, x = _micro(case), _input(case)
    with torch.no_grad():
        found = model.use_backend("reference").forward_details(x.float())
    arrays = _arrays("micro_r_meeto", "uniform")
    np.testing.assert_array_equal(found.merged[-1][0], arrays["src1"])
    assert relative_error(found.logits, arrays["logits.f64"]) <= 1e-5


# GFLOPs: printed in the paper; counted by its code, with merging.
@pytest.mark.parametrize(
    ("name", "r", "printed", "counted"),
    [
        ("vim_tiny", 5, 1.28, 1.2846),
        ("vim_small", 11, 3.58, 3.5848),
        ("vim_base", 11, 13.21, 13.2088),
    ],
)
def test_published_flops(name, r, printed, counted):
    with torch.device("meta"):
        work = count(vssm.create_model(name, schedule=MergeSchedule(r)))
    assert work.published / 1e9 == pytest.approx(printed, abs=5e-3)
    assert work.published / 1e9 == pytest.approx(counted, abs=1e-4)
    # Both directions of the scan, which the published figure leaves out.
    assert work.published < work.true


def test_flops_as_the_official_counter_has_them():
    with torch.device("meta"):
        work = count(vssm.create_model("vim_tiny", schedule=MergeSchedule(5)))
    assert work.published == _arrays("r_meeto", "vim_tiny_r5")["flops_as_counted"][0]
    with torch.device("meta"):
        work = count(Vim(VimConfig(image_size=80, d_model=48, depth=6), MergeSchedule(3)))
    assert work.merging == 6 * 49 * 48 + 48 * (26**2 + 23**2) // 2 + 6 * 48


def test_nothing_to_merge_is_the_dense_model_exactly():
    dense, merged = micro(None), micro(MergeSchedule(0))
    x = torch.randn(2, 3, *dense.image_size)
    assert not merged.stages
    with torch.no_grad():
        torch.testing.assert_close(merged(x), dense(x), rtol=0, atol=0)


def test_equal_tokens_merge_by_the_lower_index():
    """A uniform image without positions: every similarity is 1, so ties alone decide."""
    model = micro(MergeSchedule(3, start=1, every=5)).double()
    with torch.no_grad():
        model.pos_embed.zero_()
        model.cls_token.copy_(model.patch_embed(torch.zeros(1, 3, *model.image_size))[:, :1])
        for layer in model.layers:
            layer.mixer.in_proj.weight.zero_()
            layer.mixer.out_proj.weight.zero_()
        hook = model.layers[0].mixer.register_forward_hook(lambda m, a, o: (o[0] + 1, o[1]))
        found = model.forward_details(torch.zeros(2, 3, *model.image_size).double())
        hook.remove()
    source, joined = found.merged[0]
    assert source.tolist() == [[0, 2, 4]] * 2
    assert joined.tolist() == [[1, 1, 1]] * 2
    assert found.merges[0].size[:, 0].tolist() == [4.0, 4.0]


def test_a_merged_token_is_the_mean_of_what_it_stands_for():
    """Two merges in a row weigh by size: the second averages original tokens, not averages."""
    model = micro(MergeSchedule(18, start=1, every=1, class_token="true")).double()
    seen = []
    hook = model.layers[2].register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    x = torch.randn(1, 3, *model.image_size).double()
    with torch.no_grad():
        found = model.forward_details(x, with_blocks=True)
    hook.remove()
    residual = found.blocks[1][1][0]  # before the second merge, its tokens already means
    size = found.merges[0].size[0]
    groups = {i: [i] for i in range(len(size))}
    for source, joined in zip(*(p[0].tolist() for p in found.merged[1]), strict=True):
        groups[joined] += groups.pop(source)
    means = [(residual[g] * size[g, None]).sum(0) / size[g].sum() for g in groups.values()]
    torch.testing.assert_close(seen[0][0], torch.stack(means), rtol=1e-12, atol=1e-12)
    assert found.merges[1].size.sum() == 37


@pytest.mark.parametrize("alignment", ["gap", "size"])
def test_alignment_is_the_gap_of_the_scan(alignment, monkeypatch):
    class_token = "true" if alignment == "gap" else "proportional"
    model = micro(MergeSchedule(6, alignment=alignment, class_token=class_token))
    gaps = []
    scan = reference.selective_scan
    monkeypatch.setattr(
        reference, "selective_scan", lambda *a, **k: (gaps.append(k["gap"]), scan(*a, **k))[1]
    )
    with torch.no_grad():
        found = model.use_backend("reference").forward_details(torch.randn(2, 3, 48, 48))
    last = gaps[-1]
    if alignment == "size":
        wanted = found.merges[-1].size.int()
        torch.testing.assert_close(last[:, 0], wanted)
        torch.testing.assert_close(last[:, 1], wanted.flip(1))
    else:
        position = found.kept_positions[-1].int()
        assert bool((position.diff(dim=1) > 0).all())
        torch.testing.assert_close(last[:, 0, 1:], position.diff(dim=1))
        torch.testing.assert_close(last[:, 1, 1:], position.diff(dim=1).flip(1))


@pytest.mark.parametrize("alignment", ["gap", "none"])
def test_pruning_and_merging_in_one_schedule(alignment):
    prune = PruneSchedule({1: 0.7}, alignment=alignment)
    schedule = MergeSchedule(4, alignment=alignment, class_token="true", prune=prune)
    model = micro(schedule).double()
    assert [s.num_keep for s in model.stages.values()] == [27, 23]
    with torch.no_grad():
        found = model.forward_details(torch.randn(3, 3, 48, 48).double())
    first, second = found.kept_positions
    for image in range(3):
        assert set(second[image].tolist()) < set(first[image].tolist())
        assert 18 in second[image]  # the class token
    # What was pruned is in no token: sizes count what is left.
    assert found.merges[0].size.sum(1).tolist() == [27.0] * 3


@pytest.mark.parametrize("conv", ["compact", "position"])
def test_one_convolution_where_tokens_are_pruned_too(conv):
    prune = PruneSchedule({2: 0.7}, alignment="none", conv=conv)
    model = micro(MergeSchedule(4, start=1, every=9, class_token="true", prune=prune), depth=4)
    seen = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda m, args: seen.append(args[2].conv_on_grid))
    with torch.no_grad():
        model(torch.randn(2, 3, 48, 48))
    # After the merge as after the pruning; before both there is nothing to be in place of.
    assert seen == [False, *[conv == "position"] * 3]


def test_pruning_after_a_merge_takes_sizes_along():
    prune = PruneSchedule({2: 0.7}, alignment="none")
    schedule = MergeSchedule(4, start=1, every=9, class_token="true", prune=prune)
    model = micro(schedule, depth=4).double()
    sizes = []
    model.layers[2].register_forward_pre_hook(lambda m, args: sizes.append(args[2].size))
    with torch.no_grad():
        found = model.forward_details(torch.randn(2, 3, 48, 48).double())
    before, after = found.kept_positions
    for image in range(2):
        of = dict(zip(before[image].tolist(), found.merges[0].size[image].tolist(), strict=True))
        assert sizes[0][image].tolist() == [of[p] for p in after[image].tolist()]


def test_gradients_reach_every_merged_token():
    model = micro(MergeSchedule(6)).train()
    embedded = model.patch_embed(torch.randn(2, 3, 48, 48)).detach().requires_grad_()
    model.patch_embed.forward = lambda images: embedded
    model(torch.zeros(2, 3, 48, 48)).square().sum().backward()
    assert bool((embedded.grad.abs().sum(-1) > 0).all())


@pytest.mark.parametrize("changes", [{"class_token": "head"}, {"class_token": "none"}], ids=str)
def test_other_class_token_layouts(changes):
    model = micro(MergeSchedule(6), **changes)
    with torch.no_grad():
        found = model.forward_details(torch.randn(2, 3, 48, 48))
    assert found.merges[0].size.sum(1).tolist() == [float(model.config.seqlen)] * 2
    if changes["class_token"] == "head":
        assert found.kept_positions[-1][:, 0].tolist() == [0, 0]


def _left(schedule: MergeSchedule, layout: TokenLayout = VIM, depth: int = 24) -> list[int]:
    return [s.num_keep for s in plan_stages(schedule, layout, depth).values()]


def test_counts():
    assert _left(MergeSchedule(5)) == list(range(192, 141, -5))
    assert _left(MergeSchedule(5, final_tokens=76))[-2:] == [147, 76]
    assert _left(MergeSchedule(11))[-1] == 76
    # At most half of the patches can join the others; one beside the class token joins nothing.
    small = TokenLayout(seqlen=6, cls_index=2, keep_odd=True)
    assert _left(MergeSchedule(5, every=1, start=1), small) == [4, 3, 2]


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("5", MergeSchedule(5)),
        ("11, final_tokens=76 ,class_token=true", None),
        ("3,order=false,mode=mean,metric=B,distance=l1,choose=2,start=1,every=3", None),
    ],
)
def test_parse(text, schedule):
    found = MergeSchedule.parse(text)
    if schedule is not None:
        assert found == schedule
    elif text.startswith("11"):
        assert found == MergeSchedule(11, final_tokens=76, class_token="true")
    else:
        options = {"metric": "B", "distance": "l1", "choose": 2, "start": 1, "every": 3}
        assert found == MergeSchedule(3, order=False, mode="mean", **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.8", "'0.8' is not a number of tokens; write 5"),
        ("5,tokens", "'tokens' is not KEY=VALUE"),
        ("5,fina_tokens=3", "did you mean 'final_tokens'"),
        ("5,order=no", "order='no' is not true or false"),
        ("5,start=two", "start='two' is not an integer"),
        ("5,start=1,start=2", "each once"),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        MergeSchedule.parse(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": -1}, "r=-1 is not an integer from 0"),
        ({"r": True}, "r=True is not an integer"),
        ({"every": 0}, "every=0 is not an integer from 1"),
        ({"final_tokens": 0}, "final_tokens=0 is not an integer from 1"),
        ({"r": 0, "final_tokens": 76}, "merges nothing"),
        ({"metric": "x"}, "metric='x' is not one of hidden, B, C, delta"),
        ({"distance": "dot"}, "distance='dot'"),
        ({"mode": "max"}, "mode='max'.*did you mean 'amax'"),
        ({"class_token": "middle"}, "class_token='middle'"),
        ({"alignment": "constant"}, "alignment='constant' is not one of none, gap, size"),
        ({"alignment": "gap"}, "use class_token='true'"),
        ({"alignment": "size", "mode": "mean"}, "sizes count no tokens"),
        ({"order": False, "class_token": "true"}, "order=False"),
        ({"prune": PruneSchedule({5: 0.8}, alignment="none")}, "differs from image to image"),
        (
            {"class_token": "true", "prune": PruneSchedule({5: 0.8})},
            "use 'gap' for both, or 'none' for both",
        ),
        (
            {
                "class_token": "true",
                "prune": PruneSchedule({5: 0.8}, alignment="none", importance="as_released"),
            },
            "another importance",
        ),
    ],
)
def test_refused_rules(options, message):
    with pytest.raises(ValueError, match=message):
        MergeSchedule(**options)


def test_refused_by_the_model():
    with pytest.raises(TypeError, match="order='no' is not true or false"):
        MergeSchedule(order="no")
    with pytest.raises(ValueError, match="start=3 is not among the blocks 1 to 2"):
        micro(MergeSchedule(5, start=3))
    with pytest.raises(ValueError, match="final_tokens=200 is more than the 147 tokens"):
        _left(MergeSchedule(5, final_tokens=200))
    with pytest.raises(ValueError, match="choose=9 of the 5 tokens"):
        _left(MergeSchedule(5, choose=9, start=1), TokenLayout(12, 6, keep_odd=True))
    both = MergeSchedule(5, class_token="true", prune=PruneSchedule({2: 0.8}, alignment="none"))
    with pytest.raises(ValueError, match="block=2 both prunes and merges"):
        _left(both)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("plain_mamba_l1", MICRO_PLAIN, "place of every token in its grid"),
        ("vmamba_tiny_s1l8", {}, "'5 merged after every 2 blocks from block 2'.*hierarchical"),
        ("groupmamba_tiny", {}, "hierarchical"),
        ("vim_tiny", {"class_token": "double"}, "two class tokens"),
        ("vim_tiny", {"bidirectional_layers": True, "bimamba": "none"}, "nor one list of tokens"),
    ],
)
def test_families_that_cannot_merge(name, options, message):
    with pytest.raises(UnsupportedError, match=message):
        vssm.create_model(name, schedule=MergeSchedule(5), **options)


def test_what_the_command_line_means():
    assert ModelSource("vim_tiny", merge="5").checked() == MergeSchedule(5)
    sized = ModelSource("vim_tiny", merge="5", alignment="size").checked()
    assert sized == MergeSchedule(5, alignment="size")
    asked = {"merge": "5,class_token=true", "schedule": "9:0.8", "alignment": "gap"}
    assert ModelSource("vim_tiny", **asked).checked() == MergeSchedule(
        5, class_token="true", alignment="gap", prune=PruneSchedule({9: 0.8})
    )


def test_a_merged_model_can_be_distilled(tmp_path):
    source = ModelSource("vim_tiny", tmp_path / "w.pth", merge="5")
    recipe = Recipe(distil=0.5)
    FinetuneRequest(source, tmp_path, tmp_path, recipe)  # the teacher is the dense model
    with pytest.raises(ValueError, match="needs a schedule and a checkpoint"):
        FinetuneRequest(ModelSource("vim_tiny", merge="5"), tmp_path, tmp_path, recipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "5", "importance": "l2"}, "importance='l2' without a schedule"),
        ({"merge": "5", "conv": "position"}, "conv='position' without a schedule"),
        ({"merge": "5", "schedule": MergeSchedule(5)}, "merge='5' beside a MergeSchedule"),
        ({"schedule": MergeSchedule(5), "alignment": "size"}, "beside a MergeSchedule"),
        ({"merge": "5", "tokens": "masked"}, "tokens='masked' with merged tokens"),
        ({"schedule": MergeSchedule(5), "tokens": "fused"}, "tokens='fused' with merged tokens"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        ModelSource("vim_tiny", **options)
