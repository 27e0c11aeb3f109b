#!/usr/bin/env bash
# Runs the tests: launch/test.sh [pytest arguments]. Makes .venv on first use.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
cd "$infmae_root"
# A process a core, at most four; a file stays in one process, with its fixtures. Order: tests/conftest.py.
exec "$infmae_venv/bin/python" -m pytest -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder "$@"
