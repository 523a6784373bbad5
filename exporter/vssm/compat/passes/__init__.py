"""The graph passes in their order, over a program that torch.export made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch.export import ExportedProgram

from vssm.compat.passes.graph import PassReport, Rewriter, rename_outputs, run_pass
from vssm.compat.passes.layouts import move_layouts
from vssm.compat.passes.merge import absorb_orders, fold_scales, merge_scans
from vssm.compat.passes.tidy import drop_copies, one_form, share, unfold_projections, unpack

PASSES: Final[tuple[tuple[str, Callable[[Rewriter], None]], ...]] = (
    ("drop copies", drop_copies),
    ("one form", one_form),
    ("unfold projections", unfold_projections),
    ("unpack", unpack),
    ("move layouts", move_layouts),
    ("share equal nodes", share),
    ("absorb orders", absorb_orders),
    ("share what is equal now", share),
    ("merge scans", merge_scans),
    ("move layouts again", move_layouts),
    ("fold scales", fold_scales),
)


def simplify(program: ExportedProgram) -> list[PassReport]:
    """Bring the scans of a program to as few token-major nodes as is provably the same.

    Args:
        program: `without_mutation`; changed in place; its inputs, outputs and weights stay.

    Returns:
        What each pass did, and why it did not where it might have.
    """
    reports = [run_pass(program, name, change) for name, change in PASSES]
    rename_outputs(program)
    program.graph_module.recompile()
    return reports
