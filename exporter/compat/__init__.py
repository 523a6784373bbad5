"""Upstream model code as it stands: run it, export it, prune it over this package's operators."""

from exporter.compat.context import upstream
from exporter.compat.report import UpstreamReport
from exporter.compat.scan import selective_scan_fn, selective_scan_tokens

__all__ = ["UpstreamReport", "selective_scan_fn", "selective_scan_tokens", "upstream"]
