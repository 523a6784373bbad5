"""Where the weights lie in a file: usual names at any depth, a key, or a list of places."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_cases import Bare, Hook, assert_loaded, assert_refused, save, weights

from vssm.checkpoints.load import load_checkpoint, save_safetensors

STATE = weights(Bare())
OTHER = weights(Bare(), 2)


def nested(path: str, value) -> dict:
    for name in reversed(path.split(".")):
        value = {name: value, "epoch": 3}
    return value


@pytest.mark.parametrize(
    "path",
    [
        *("model", "state_dict", "model_state_dict", "model_state", "params", "net", "network"),
        *("weights", "module", "checkpoint", "checkpoint.model", "model.state_dict"),
        *("checkpoint.model.state_dict", "state_dict.model.module", "net.params"),
    ],
)
def test_usual_names_at_any_depth(tmp_path, path):
    model = Bare()
    report = load_checkpoint(model, save(nested(path, STATE), tmp_path / "a.pth"))
    assert_loaded(model, STATE)
    assert report.wrapper == path
    assert f"under {path!r}" in str(report)


@pytest.mark.parametrize(
    "path",
    [
        *("model_ema", "state_dict_ema", "params_ema", "ema", "ema_state_dict", "ema_model"),
        *("ema.module", "checkpoint.model_ema", "ema.state_dict", "model_ema.module"),
        *("shadow", "ema.shadow", "model_ema.shadow"),
    ],
)
def test_averaged_weights_by_choice_only(tmp_path, path):
    model = Bare()
    alone = save(nested(path, STATE), tmp_path / "a.pth")
    assert_refused(model, alone, "averaged", path, "--ema")
    path_beside = save({**nested(path, STATE), "params": OTHER}, tmp_path / "b.pth")
    load_checkpoint(model, path_beside)
    assert_loaded(model, OTHER)
    for file in (alone, path_beside):
        report = load_checkpoint(model, file, weights="ema")
        assert_loaded(model, STATE)
        assert report.wrapper == path
    assert_refused(Bare(), save({"params": OTHER}, alone), "no averaged", weights="ema")


def test_a_key_names_what_has_no_usual_name(tmp_path):
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}}
    content = {"generator": {"weights": STATE, "a.b": OTHER}, "optimizer": optimizer, "epoch": 1}
    path = save(content, tmp_path / "a.pth")
    assert_refused(Bare(), path, "generator.weights", "generator.a.b", "--key generator.weights")
    for key, expected in (("generator.weights", STATE), ("generator.a.b", OTHER)):
        model = Bare()
        report = load_checkpoint(model, path, key=key)
        assert_loaded(model, expected)
        assert report.wrapper == key
        assert set(report.ignored) == {"optimizer", "epoch"}
    for key in ("optimizer", "generator.weights.stem.weigh", "epoch", "x", "a.b"):
        assert_refused(Bare(), path, f"key={key!r} leads to no weights", key=key)
    assert_refused(Bare(), path, "generator.weights", key="optimizer.state.0")
    with pytest.raises(ValueError, match="give a key alone"):
        load_checkpoint(Bare(), path, key="generator", weights="ema")
    with pytest.raises(ValueError, match="key=''"):
        load_checkpoint(Bare(), path, key="")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_key_names_what_keys_begin_with(tmp_path, suffix):
    flat = {f"student.{k}": v for k, v in STATE.items()}
    flat |= {f"teacher.net.{k}": v for k, v in OTHER.items()}
    path = tmp_path / f"a.{suffix}"
    if suffix == "pth":
        save(flat, path)
    else:
        save_safetensors(flat, path)
    for key, expected in (("student", STATE), ("teacher", OTHER), ("teacher.net", OTHER)):
        model = Bare()
        load_checkpoint(model, path, key=key)
        assert_loaded(model, expected)


def test_several_state_dicts_are_named(tmp_path):
    path = save({"model": STATE, "net": {"params": OTHER}}, tmp_path / "a.pth")
    assert_refused(Bare(), path, "model and net.params", "--key model")
    for key in ("net", "net.params"):
        report = load_checkpoint(model := Bare(), path, key=key)
        assert_loaded(model, OTHER)
        assert report.wrapper == "net.params"


def test_one_state_dict_under_two_names_is_one(tmp_path):
    load_checkpoint(model := Bare(), save({"model": STATE, "net": STATE}, tmp_path / "a.pth"))
    assert_loaded(model, STATE)


def test_a_file_that_holds_itself(tmp_path):
    content: dict = {"epoch": 1}
    content["model"] = {"state_dict": content, "net": STATE}
    load_checkpoint(model := Bare(), save(content, tmp_path / "a.pth"))
    assert_loaded(model, STATE)


def test_metadata_beside_the_weights_is_left_out_and_said(tmp_path):
    content = {"model": {**STATE, "epoch": 3, "config": Hook()}, "epoch": torch.tensor(4)}
    report = load_checkpoint(model := Bare(), save(content, tmp_path / "a.pth"))
    assert_loaded(model, STATE)
    assert report.ignored == ("config", "epoch", "epoch")


def test_names_from_a_file_are_shown_without_control_characters(tmp_path):
    path = save({"\x1b[2J\u202e": {"\n": torch.ones(1)}}, tmp_path / "a.pth")
    message = assert_refused(Bare(), path, "--key")
    assert all(character.isprintable() for character in message)
    path = save({"model": {**STATE, "\x1b]0;\u202e\ud800": torch.ones(1)}}, path)
    message = assert_refused(Bare(), path, "unexpected")
    assert all(character.isprintable() for character in message)


# Shards


def shards(folder, state=STATE, *, count: int = 2, name: str = "model", **changes):
    """A folder of safetensors shards with an index; `changes` are to its weight_map."""
    folder.mkdir()
    keys, weight_map = list(state), {}
    for i in range(count):
        file = f"{name}-{i + 1:05}-of-{count:05}.safetensors"
        save_safetensors({k: state[k] for k in keys[i::count]}, folder / file)
        weight_map |= dict.fromkeys(keys[i::count], file)
    index = folder / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {**weight_map, **changes}}))
    return index


def test_shards_by_index_or_folder(tmp_path):
    index = shards(tmp_path / "a", {f"model.{k}": v for k, v in STATE.items()}, count=3)
    reports = []
    for path in (index, index.parent):
        model = Bare()
        reports.append(load_checkpoint(model, path))
        assert_loaded(model, {k: model.state_dict()[k] for k in STATE})
        assert all(torch.equal(model.state_dict()[k], v) for k, v in STATE.items())
    assert reports[0].format == "safetensors, 3 shards"
    assert reports[0].sha256 == reports[1].sha256
    assert reports[0].prefix_stripped == "model."
    load_checkpoint(model := Bare(), index, key="model")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in STATE.items())
    assert_refused(Bare(), index, "no averaged", weights="ema")
    changed = shards(tmp_path / "b", {f"model.{k}": v + 1 for k, v in STATE.items()}, count=3)
    assert load_checkpoint(Bare(), changed).sha256 != reports[0].sha256


def test_shards_that_torch_saved(tmp_path):
    keys = list(STATE)
    for i in range(2):
        save({k: STATE[k] for k in keys[i::2]}, tmp_path / f"pytorch_model-{i}.bin")
    listed = {k: f"pytorch_model-{i % 2}.bin" for i, k in enumerate(keys)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
    report = load_checkpoint(model := Bare(), tmp_path)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in STATE.items())
    assert report.format == "torch, 2 shards"


def test_a_shard_that_is_missing_or_alone(tmp_path):
    index = shards(tmp_path / "a")
    shard = index.parent / "model-00002-of-00002.safetensors"
    assert_refused(Bare(), shard, "one of several shards")
    shard.unlink()
    for path in (index, index.parent):
        with pytest.raises(Exception, match=r"of 2 shards model-00002.* is missing; download"):
            load_checkpoint(Bare(), path)


@pytest.mark.parametrize("name", ["../b.safetensors", "/etc/passwd", "..", ".", "", 3, None, "a/b"])
def test_a_shard_outside_the_folder(tmp_path, name):
    save_safetensors(STATE, tmp_path / "b.safetensors")
    index = shards(tmp_path / "a", **{"head.bias": name})
    assert_refused(Bare(), index, "outside the index's own folder")


def test_shards_that_do_not_hold_what_the_index_says(tmp_path):
    index = shards(tmp_path / "a", other="model-00001-of-00002.safetensors")
    assert_refused(Bare(), index, "does not hold what the index says", "other")
    index = shards(tmp_path / "b", other="model.safetensors.index.json")
    assert_refused(Bare(), index, "files of weights")
    shard = (index := shards(tmp_path / "c")).parent / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(Exception, match="a directory, not a regular file"):
        load_checkpoint(Bare(), index)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 9999]
)
def test_an_index_that_is_none(tmp_path, content):
    (tmp_path / "a.index.json").write_text(content)
    assert_refused(Bare(), tmp_path / "a.index.json")


def test_a_folder_without_an_index(tmp_path):
    assert_refused(Bare(), tmp_path, "directory with no index of shards")
    save(STATE, tmp_path / "a.pth")
    assert_refused(Bare(), tmp_path, "name the file inside: a.pth")
    shards(tmp_path / "b", name="one")
    (tmp_path / "b" / "two.index.json").write_text("{}")
    assert_refused(Bare(), tmp_path / "b", "2 indices of shards", "one.safetensors.index.json")
