"""The graph passes in their order, over a program that torch.export made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch.export import ExportedProgram

from vssm.compat.passes.convolutions import join_convolutions
from vssm.compat.passes.graph import PassReport, Rewriter, run_pass
from vssm.compat.passes.layouts import move_layouts
from vssm.compat.passes.merge import absorb_orders, fold_scales, merge_scans
from vssm.compat.passes.pointwise import fold_biases, fold_gates, fold_softplus
from vssm.compat.passes.tidy import (
    drop_copies,
    one_form,
    share,
    split_projections,
    unfold_projections,
    unpack,
)
from vssm.compat.passes.walks import follow_walks
from vssm.onnx.decompose import rename_outputs

PASSES: Final[tuple[tuple[str, Callable[[Rewriter], None]], ...]] = (
    # Copies and synonyms first: every later pass looks for exact neighbours in one spelling.
    ("drop copies", drop_copies),
    ("one form", one_form),
    # These two look for permutes and views where the tracer put them, so before any of these moves.
    ("unfold projections", unfold_projections),
    # Before packs are taken apart: a walk is read off whole.
    ("follow walks", follow_walks),
    ("unpack", unpack),
    ("move layouts", move_layouts),
    # Equal operands are found by identity, and only moved layouts make them equal.
    ("share equal nodes", share),
    # Flips stand behind convolutions now, and permutes in front of them.
    ("join convolutions", join_convolutions),
    ("move layouts behind them", move_layouts),
    ("share what reads them", share),
    # Scans with the same attributes merge.
    ("fold softplus", fold_softplus),
    ("fold biases", fold_biases),
    ("fold gates", fold_gates),
    # Each scan gets its own order while it is still one direction; then they can merge.
    ("absorb orders", absorb_orders),
    ("share what is equal now", share),
    ("merge scans", merge_scans),
    # The merged node's operands were stacked, which brought permutes of its own.
    ("move layouts again", move_layouts),
    ("fold gates of sums", fold_gates),
    # Parts that lie together were stacked as one till here.
    ("split projections", split_projections),
    # Last: the factor of a sum is a factor of a scan only once the sum is one node.
    ("fold scales", fold_scales),
)


def simplify(
    program: ExportedProgram, probes: tuple[Mapping[Any, int], ...] = ({},)
) -> list[PassReport]:
    """Bring the scans of a program to as few token-major nodes as is provably the same.

    Args:
        program: `without_mutation`; its graph is changed in place, and not compiled to code again;
            its inputs, outputs and weights stay.
        probes: as `Rewriter` has them, of a program with more free sizes than the batch.

    Returns:
        What each pass did, and why it did not where it might have.
    """
    reports = [run_pass(program, name, change, probes) for name, change in PASSES]
    rename_outputs(program)
    return reports
