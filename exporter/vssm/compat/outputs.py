"""What a user's module returns, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vssm.compat.pruned import PrunedModule
from vssm.errors import UnsupportedError


def public_outputs(
    names: Sequence[str] | None = None, *, scores: bool = False
) -> Callable[[nn.Module, Tensor], dict[str, Tensor]]:
    """A function from a module and its input to the outputs by name, in order.

    Args:
        names: a name for each; None for logits, output_1, ...; a pruned module has its own.
        scores: also a pruned module's scores, which are no outputs of the file.
    """

    def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        if isinstance(model, PrunedModule):
            return _pruned_outputs(model, x, names, scores)
        found = flat(model(x))
        given = list(names or ("logits", *(f"output_{i}" for i in range(1, len(found)))))
        if len(given) != len(found) or len(set(given)) < len(found) or given[0] != "logits":
            raise ValueError(
                f"outputs={given} for {len(found)} outputs; name each once, the first 'logits'"
            )
        return dict(zip(given, found, strict=True))

    return outputs


def _pruned_outputs(
    model: PrunedModule, x: Tensor, names: Sequence[str] | None, scores: bool
) -> dict[str, Tensor]:
    details = model.forward_details(x)
    found = {"logits": details.logits}
    found |= {f"kept_positions_{i}": kept for i, kept in enumerate(details.kept_positions)}
    if names is not None and list(names) != list(found):
        raise ValueError(f"outputs={list(names)}: a pruned module has {list(found)}; leave it out")
    return found | (
        {f"scores_{i}": score for i, score in enumerate(details.scores)} if scores else {}
    )


def flat(value: Any) -> tuple[Tensor, ...]:
    """The tensors of what a module returned: a tensor, a tuple, a mapping, or nested ones.

    Raises:
        UnsupportedError: there is something else in it.
    """
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple) and value:
        return tuple(t for part in value if part is not None for t in flat(part))
    raise UnsupportedError(
        f"the module returns {type(value).__name__}, not tensors; wrap it in a module whose "
        "forward returns the logits"
    )
