# Makes the virtual environment .venv of this checkout. Sourced by the scripts beside it, not run.
#
#   INFMAE_PYTHON  the Python to use (3.11 to 3.13); by default the first suitable one found
#   INFMAE_EXTRAS  accelerator extra: cuda, tpu or none; by default cuda where nvidia-smi works, else none

infmae_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
infmae_venv="$infmae_root/.venv"

find_python() {
  local candidate
  for candidate in ${INFMAE_PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11, 3.12 or 3.13 found; install one or set INFMAE_PYTHON to it" >&2
  return 2
}

# prepare_environment [EXTRA]: makes .venv if missing and installs this checkout in it, with the extra. Installs again
# only when pyproject.toml or the extras change; an interrupted installation is taken up again.
prepare_environment() {
  local extras=${1:-} accelerator=${INFMAE_EXTRAS:-} python stamp
  if [ -z "$accelerator" ] && nvidia-smi >/dev/null 2>&1; then accelerator=cuda; fi
  if [ -n "$accelerator" ] && [ "$accelerator" != none ]; then extras=${extras:+$extras,}$accelerator; fi
  stamp="$infmae_venv/.installed-${extras:-base}"
  if [ -f "$stamp" ] && [ ! "$infmae_root/pyproject.toml" -nt "$stamp" ]; then return; fi
  if [ ! -x "$infmae_venv/bin/python" ]; then
    python=$(find_python) || return
    echo "making $infmae_venv with $("$python" --version)" >&2
    "$python" -m venv "$infmae_venv"
  fi
  echo "installing infmae-jax${extras:+[$extras]} (a few minutes the first time)" >&2
  "$infmae_venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -e "$infmae_root${extras:+[$extras]}" || {
    echo "error: installation failed; look at the messages above, then run the same command again" >&2
    return 2
  }
  touch "$stamp"
}
