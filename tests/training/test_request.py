"""What a training run may be asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from exports import SCHEDULE
from finetune_cases import model_source, request, write_pictures

import vssm
from vssm import ModelSource, Resources


def test_refusals(tmp_path):
    data, checkpoint = write_pictures(tmp_path / "data"), tmp_path / "is_not_read.pth"
    with pytest.raises(ValueError, match="tokens='masked' without a schedule prunes nothing"):
        ModelSource("vim_tiny", tokens="masked")
    with pytest.raises(ValueError, match="alignment='gap' with tokens='masked'"):
        model_source(tokens="masked", alignment="gap")
    with pytest.raises(ValueError, match="conv='position' with tokens='masked', whose convolution"):
        model_source(tokens="masked", conv="position")
    whole = vssm.PruneSchedule.parse(SCHEDULE)
    with pytest.raises(ValueError, match="alignment='none' beside a PruneSchedule, which has its"):
        model_source(schedule=whole, alignment="none")
    with pytest.raises(ValueError, match="tokens='zero' is not one of gather, masked"):
        model_source(tokens="zero")
    with pytest.raises(ValueError, match="importance='l1' without a schedule"):
        ModelSource("vim_tiny", importance="l1")
    drawing = model_source(importance="random", seed=3).checked()
    assert (drawing.importance, drawing.seed) == ("random", 3)
    with pytest.raises(ValueError, match="seed=3 with importance='clip', which draws nothing"):
        model_source(seed=3)
    with pytest.raises(ValueError, match="weights='ema' without a checkpoint"):
        ModelSource("vim_tiny", weights="ema")
    with pytest.raises(ValueError, match="key='net' without a checkpoint"):
        ModelSource("vim_tiny", key="net")
    with pytest.raises(ValueError, match="new_head=True without a checkpoint"):
        ModelSource("vim_tiny", new_head=True)
    with pytest.raises(ValueError, match="key='net' with weights='ema': a key says which"):
        model_source(checkpoint, weights="ema", key="net")
    with pytest.raises(ValueError, match="the teacher's head would be untrained too"):
        request(data, tmp_path, what=model_source(checkpoint, new_head=True), distil=0.5)
    with pytest.raises(ValueError, match="save_every=0 is below 1"):
        Resources(save_every=0)
    with pytest.raises(ValueError, match="batch=44 is more than the 42 images"):
        vssm.finetune(request(data, tmp_path, batch=44))
    with pytest.raises(ValueError, match=r"data=.*nowhere is not a folder; give one"):
        vssm.finetune(request(tmp_path / "nowhere", tmp_path))
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"classes=.*names.txt names 2 classes on 2 lines"):
        vssm.finetune(replace(request(data, tmp_path), classes=names))
    with pytest.raises(ValueError, match="device='tpu' is neither cpu nor cuda"):
        vssm.finetune(request(data, tmp_path, resources={"device": "tpu"}))
