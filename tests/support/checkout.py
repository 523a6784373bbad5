"""Where the checkout is."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
# For processes that tests start: the package, benchmarks, what tests share.
PYTHONPATH = os.pathsep.join(map(str, (ROOT / "exporter", ROOT, SUPPORT)))
