"""Checkpoints by their address on a hub, served from this machine."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from command import SHALLOW, Run
from exports import MICRO, micro
from hub_server import COMMIT, SECRET, Hub

import vssm
from vssm import extras
from vssm.checkpoints.hub import HubFile, check_checkpoint, hub_file
from vssm.checkpoints.load import save_safetensors
from vssm.errors import CheckpointError, MissingPackageError, UnsupportedError
from vssm.studies.compare import CompareOptions
from vssm.studies.source import load_source
from vssm.training.request import ModelSource


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://o/r/model.safetensors", ("o/r", None, "model.safetensors")),
        ("hf:/o/r.x-1/a/b.pth", ("o/r.x-1", None, "a/b.pth")),  # as a Path has it
        ("hf://o/r@v1.0/b.pth", ("o/r", "v1.0", "b.pth")),
        ("hf://o/r@refs%2Fpr%2F1/b.pth", ("o/r", "refs/pr/1", "b.pth")),
        ("hf://o/r@main", ("o/r", "main", None)),
        ("hf://o/r", ("o/r", None, None)),
    ],
)
def test_addresses(text, parts):
    assert hub_file(text) == HubFile(*parts)
    assert hub_file(str(hub_file(text))) == HubFile(*parts)


@pytest.mark.parametrize("text", ["hf://o", "hf://o/r@/f", "hf://o/r/../f", "hf:///o/r", "hf://"])
def test_what_is_no_address(text):
    with pytest.raises(ValueError, match="is not an address of a hub; write hf://OWNER/REPO/FILE"):
        hub_file(text)


def test_paths_are_none_and_the_package_is_named(monkeypatch, tmp_path):
    assert hub_file(tmp_path / "hf.pth") is None
    assert hub_file("hf/o/r") is None
    with pytest.raises(ValueError, match="is not there"):
        check_checkpoint(tmp_path / "hf.pth")
    monkeypatch.setattr(extras, "is_installed", lambda _: False)
    with pytest.raises(MissingPackageError, match=r'pip install "vssm\[hub\]"'):
        vssm.load_checkpoint(micro(depth=1, schedule=None), "hf://o/r/f.pth")


@pytest.fixture(scope="module")
def state():
    return micro(depth=1, schedule=None).state_dict()


@pytest.fixture(scope="module")
def hub(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    files = {}
    keys = sorted(state)
    shards = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, some in {"model.safetensors": keys, **shards}.items():
        save_safetensors({key: state[key] for key in some}, folder / name)
        files[name] = (folder / name).read_bytes()
    pickled = io.BytesIO()
    torch.save(state, pickled)
    whole, pth = files["model.safetensors"], pickled.getvalue()
    index = {"weight_map": {key: name for name, some in shards.items() for key in some}}
    parts = {f"snapshots/{name}": files[name] for name in shards}  # as the cache calls a folder
    server = Hub(
        {
            "open/both": {"weights.pth": pth, "README.md": b"", "model.safetensors": whole},
            "open/old": {"weights.pth": pth},
            "open/shards": {
                "snapshots/x.safetensors.index.json": json.dumps(index).encode(),
                **parts,
            },
            "open/many": {"a.pth": pth, "b.pth": pth},
            "open/text": {"README.md": b""},
            "closed/model": {"model.safetensors": whole},
        }
    )
    yield server
    server.close()


@pytest.fixture(scope="module")
def library(hub, tmp_path_factory):
    """huggingface_hub's settings, which it reads from the environment when it is imported."""
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("the extra `hub` is not installed")
    _forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv("HF_TOKEN", raising=False)
        yield importlib.import_module("huggingface_hub.constants")
    _forget()


def _forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


@pytest.fixture
def cache(library, hub):
    hub.asked.clear()
    return library


def _load(address):
    model = micro(depth=1, schedule=None)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    return model, vssm.load_checkpoint(model, address)


@pytest.mark.parametrize(
    ("address", "file", "form"),
    [
        ("hf://open/both/weights.pth", "weights.pth", "torch"),
        ("hf://open/both@refs%2Fpr%2F1/model.safetensors", "model.safetensors", "safetensors"),
        ("hf://open/both", "model.safetensors", "safetensors"),
        ("hf://open/old@main", "weights.pth", "torch"),
        ("hf://open/shards", "snapshots/x.safetensors.index.json", "safetensors, 2 shards"),
    ],
)
def test_a_checkpoint_is_downloaded_once(cache, hub, state, address, file, form):
    model, report = _load(address)
    pinned = f"{address.split('@')[0].removesuffix(f'/{file}')}@{COMMIT}/{file}"
    assert (report.path, report.format) == (pinned, form)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert (model.checkpoint.file, model.checkpoint.sha256) == (pinned, report.sha256)
    hub.asked.clear()
    assert _load(pinned)[1] == report
    assert [line for line in hub.asked if line.startswith("GET /open")] == []


def test_the_cache_serves_without_a_network(cache, hub, monkeypatch):
    report = _load("hf://open/both/weights.pth")[1]
    hub.asked.clear()
    monkeypatch.setattr(cache, "HF_HUB_OFFLINE", True)
    assert _load("hf://open/both/weights.pth")[1] == report
    with pytest.raises(CheckpointError, match=r"hf://open/both/other.pth cannot be had"):
        _load("hf://open/both/other.pth")
    assert hub.asked == []


def test_what_cannot_be_had(cache, monkeypatch):
    for address, message in (
        ("hf://open/none/f.pth", r"hf://open/none/f\.pth cannot be had \(.*log in with"),
        ("hf://open/none", r"hf://open/none cannot be had"),
        ("hf://open/both/f.pth", r"cannot be had \(.*Entry Not Found"),
        ("hf://open/both@v9/weights.pth", r"cannot be had \(.*Revision Not Found"),
        ("hf://open/many", r"has several files of weights; name one: .* of a\.pth, b\.pth"),
        ("hf://open/text", r"has no file of weights; name one: .* of README\.md"),
        ("hf://closed/model", "cannot be had"),
    ):
        with pytest.raises(CheckpointError, match=message):
            _load(address)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert _load("hf://closed/model")[1].format == "safetensors"


@pytest.mark.parametrize("function", ["list_repo_files", "hf_hub_download"])
def test_a_network_that_is_away(cache, monkeypatch, function):
    # Not a kind of OSError.
    away = importlib.import_module("huggingface_hub.errors").HTTPError("connection refused")

    def refuse(*_, **__):
        raise away

    monkeypatch.setattr(importlib.import_module("huggingface_hub"), function, refuse)
    with pytest.raises(
        CheckpointError, match=r"hf://open/old\S* cannot be had \(connection refused"
    ):
        vssm.load_checkpoint(micro(depth=1, schedule=None), "hf://open/old")


def test_the_command_takes_an_address(cache, cli: Run, tmp_path, monkeypatch):
    def told(model, *_, **__):  # in place of an export, which takes seconds
        raise UnsupportedError(f"{model.checkpoint.file} and {model.loaded}")

    monkeypatch.setattr("vssm.onnx.export.export", told)
    assert cli("export", *SHALLOW, "--checkpoint=hf://open/both", "-o", tmp_path / "out") == 2
    pinned = f"hf://open/both@{COMMIT}/model.safetensors"
    assert f"error: {pinned} and " in cli.out
    assert f"tensors from {pinned} (safetensors)" in cli.out
    assert cli("export", *SHALLOW, "--checkpoint=hf://open", "-o", tmp_path / "out") == 2
    assert "is not an address of a hub" in cli.out


def test_studies_take_addresses(cache, state, tmp_path):
    # A Path has one slash: what is shown has two again.
    sizes = {key: value for key, value in MICRO.items() if key != "num_classes"}
    source = ModelSource(
        "vim_tiny", Path("hf://open/both"), num_classes=7, options={**sizes, "depth": 1}
    )
    loaded = load_source(source)
    assert loaded.weights == "hf://open/both"
    assert all(torch.equal(state[key], value) for key, value in loaded.state.items())
    for address, options, message in (
        ("hf://open", CompareOptions(images=tmp_path), "is not an address of a hub"),
        ("hf://open/both", CompareOptions(images=tmp_path), "is a checkpoint, which does not say"),
        ("hf://open/both", CompareOptions(), "has no results yet; give --images"),
    ):
        with pytest.raises(ValueError, match=message):
            vssm.compare([address, tmp_path], tmp_path / "compared", options)
