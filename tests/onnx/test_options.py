"""Dtypes by the names that people give them."""

from __future__ import annotations

import pytest
import torch

from vssm.onnx.options import check_opset, checked_dtype
from vssm.ops.spec import FLOAT_TYPES


@pytest.mark.parametrize(
    ("given", "name"),
    [
        *((name, name) for name in FLOAT_TYPES),
        *((dtype, str(dtype).removeprefix("torch.")) for dtype in (torch.float32, torch.bfloat16)),
        *(("fp16", "float16"), ("half", "float16"), (torch.half, "float16")),
        *(("bf16", "bfloat16"), ("fp32", "float32")),
    ],
    ids=str,
)
def test_a_dtype_has_several_names(given: object, name: str) -> None:
    assert checked_dtype(given) == name


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("int8", r"dtype='int8': an export holds floating-point weights; .* quantise"),
        (torch.int8, r"floating-point weights"),
        ("float61", r"dtype='float61' is not one of .*; did you mean 'float16'"),
        ("complex", r"dtype='complex' is not one of float32, float16, bfloat16; choose one"),
        (torch.float64, r"dtype='float64' is not one of"),
    ],
    ids=str,
)
def test_another_dtype_gets_an_answer(given: object, answer: str) -> None:
    with pytest.raises(ValueError, match=answer):
        checked_dtype(given)


def test_opset_outside_the_bodies() -> None:
    check_opset(18)
    with pytest.raises(ValueError, match=r"opset=17 is outside 18 to 20"):
        check_opset(17)
