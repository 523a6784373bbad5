"""What an export can be asked for, checked before torch is imported."""

from __future__ import annotations

from typing import Final

from vssm.errors import check_choice
from vssm.ops.spec import FLOAT_TYPES

SUPPORTED_OPSETS: Final = (18, 19, 20)
# What an export can be asked for, by the model's task.
OUTPUTS: Final = {
    "classification": ("logits",),
    "segmentation": ("logits", "labels", "features"),
    "detection": ("features", "dense", "boxes"),
}
_ALIASES: Final = {
    **{"fp32": "float32", "float": "float32", "single": "float32"},
    **{"fp16": "float16", "half": "float16", "bf16": "bfloat16"},
}


def checked_dtype(dtype: object) -> str:
    """The name of a dtype: float32, float16 or bfloat16, also as fp16, half, bf16 or torch.half.

    Raises:
        ValueError: it is none of these.
    """
    name = str(dtype).removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name in {"int8", "uint8", "qint8", "int4", "fp8"}:
        raise ValueError(
            f"dtype={dtype!r}: an export holds floating-point weights; export float16, or export "
            "float32 and quantise that with `vssm quantize`"
        )
    check_choice("dtype", name, FLOAT_TYPES)
    return name


def checked_outputs(task: str, outputs: str | None) -> str:
    """What an export of a model of this task was asked for; None is the first of `OUTPUTS`.

    Raises:
        ValueError: it has no outputs of that name.
    """
    if outputs is None:
        return OUTPUTS[task][0]
    if outputs not in OUTPUTS[task]:
        raise ValueError(
            f"outputs={outputs!r} is not one of {', '.join(OUTPUTS[task])}, which models for "
            f"{task} have; choose one of these"
        )
    return outputs


def check_opset(opset: int) -> None:
    """Refuse a version of the standard operators that no fallback body is written for.

    Raises:
        ValueError: it is outside 18 to 20.
    """
    if opset not in SUPPORTED_OPSETS:
        raise ValueError(
            f"opset={opset} is outside {SUPPORTED_OPSETS[0]} to {SUPPORTED_OPSETS[-1]}, for which "
            "there are fallback bodies; choose one of these"
        )
