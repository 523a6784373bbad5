#!/usr/bin/env bash
# Builds for the NVIDIA GPU of this machine, runs every test that needs it, also under
# compute-sanitizer, and the benchmarks; writes one JSON and one Markdown file. Installs nothing.
#
#   benchmarks/gpu_check.sh [--quick] [--only STAGE,...] [--into FILE] [--output DIR]
#   benchmarks/gpu_check.sh --list
#   PYTHON=python3.12  the interpreter; its packages are used as they are
#
# Exit code: 0 all stages ran well, 1 one failed, 2 something that it needs is missing.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null || {
  echo "gpu_check: PYTHON=$PYTHON is missing or older than 3.10; name another with PYTHON=" >&2
  exit 2
}
export PYTHONPATH="$root/exporter:$root${PYTHONPATH:+:$PYTHONPATH}"

case " $* " in
  *" --help "* | *" -h "* | *" --list "*) ;; # these need no GPU
  *) "$PYTHON" -m benchmarks.gpu.needs || exit 2 ;;
esac
exec "$PYTHON" -m benchmarks.gpu.check "$@"
