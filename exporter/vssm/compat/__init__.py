"""Upstream model code as it stands: run it, export it, prune it over this package's operators."""

from vssm.compat.packages.context import UpstreamReport, upstream
from vssm.compat.packages.scan import selective_scan_fn, selective_scan_tokens

__all__ = ["UpstreamReport", "selective_scan_fn", "selective_scan_tokens", "upstream"]
