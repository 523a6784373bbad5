"""The operator table of the native library is the one of exporter/vssm/ops/spec.py."""

from __future__ import annotations

from vssm import __version__
from vssm.ops import spec
from vssm.runtimes import library


def test_both_sides_describe_the_same_operators():
    assert library.load_table() == spec.describe_table()


def test_library_is_of_this_version():
    info = library.library_info()
    assert info.version == __version__
    assert info.operators == tuple(spec.OPERATORS)
    assert info.cpu_isa in library.ISA_NAMES
