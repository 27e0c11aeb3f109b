#!/usr/bin/env bash
# Makes .venv with this checkout in it, or brings it up to date: launch/install.sh [--dry-run]
#
#   INFMAE_PYTHON, INFMAE_EXTRAS: see environment.sh
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/steps.sh"
parse_options "" "$@"
# shellcheck disable=SC2016 # expanded by the inner shell
last_step bash -euo pipefail -c 'source "$1/environment.sh"; prepare_environment' install "$launch"
