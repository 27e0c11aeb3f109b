#!/usr/bin/env bash
# Runs the tests: launch/test.sh [pytest arguments]. Makes .venv on first use.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
cd "$infmae_root"
exec "$infmae_venv/bin/python" -m pytest "$@"
