#!/usr/bin/env bash
# Pretrains on this machine: launch/local.sh [--config=FILE.py --workdir=RUN --config.key=value ...]
# Without arguments: the demo on the embedded synthetic data set. Makes .venv on first use.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
exec "$infmae_venv/bin/python" -m infmae_jax.pretrain "$@"
