#!/usr/bin/env bash
# Runs the tests: launch/test.sh [pytest arguments]. Makes .venv on first use.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
cd "$infmae_root"
# The TPU compiler, for the tests that compile for TPUs which are only described. Apart from the environment, where JAX
# would look for a TPU; without it they are skipped.
if [ -z "${INFMAE_COMPILERS:-}" ]; then
  wanted=$("$infmae_venv/bin/python" -c 'import importlib.metadata as metadata
print(next(each.split(";")[0].strip() for each in metadata.requires("jax") if each.startswith("libtpu")))')
  export INFMAE_COMPILERS="$infmae_venv/${wanted//[^a-z0-9.]/}"
  if [ ! -d "$INFMAE_COMPILERS/libtpu" ]; then
    "$infmae_venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
      --target "$INFMAE_COMPILERS" "$wanted" || echo "without $wanted, tests that need it are skipped" >&2
  fi
fi
# A process a core, at most four; a file stays in one process, with its fixtures. Order: tests/conftest.py.
exec "$infmae_venv/bin/python" -m pytest -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder "$@"
