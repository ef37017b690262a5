#!/usr/bin/env bash
# Makes the virtual environment .venv/ of this checkout with the pinned packages, or skips at once
# when nothing that it depends on has changed. launch/quickstart.sh and launch/test.sh call it first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$(pwd -P)
python=$root/.venv/bin/python
stamp=$root/.venv/tuner-setup.stamp
log=$root/.venv/tuner-setup.log

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$@" >&2; exit 1; }

supported() { # does this interpreter run, and is it one of the versions that pyproject.toml allows?
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() {
  local name
  for name in ${PYTHON:-} python3.11 python3.12 python3; do
    if supported "$name"; then
      command -v "$name"
      return
    fi
  done
  fail 'Python 3.11 or 3.12 is needed, and neither was found on PATH.' \
    'Debian or Ubuntu: apt-get install python3.11 python3.11-venv; or name one: PYTHON=/path/to/python3.12'
}

wanted_stamp() { # everything that the environment's contents depend on
  "$python" - "$gpu" pyproject.toml constraints.txt <<'PY'
import hashlib
import pathlib
import sys

digest = hashlib.sha256(f"{sys.version_info[:2]} gpu={sys.argv[1]}".encode())
for name in sys.argv[2:]:
    digest.update(hashlib.sha256(pathlib.Path(name).read_bytes()).digest())
print(digest.hexdigest())
PY
}

usable_venv() { # it runs, and it was made for this folder (a virtual environment cannot be moved)
  supported "$python" || return 1
  local made
  made=$(sed -n 's/^command *= *//p' .venv/pyvenv.cfg 2>/dev/null || true)
  [[ -z $made || $made == *"$root/.venv" ]]
}

make_venv() {
  local found
  found=$(find_python)
  say "making .venv with $("$found" --version)"
  rm -rf .venv
  if ! "$found" -m venv .venv >/dev/null 2>&1; then
    rm -rf .venv
    fail "$found cannot make a virtual environment; on Debian or Ubuntu the package python3.11-venv is missing."
  fi
}

pip_install() { "$python" -m pip install --no-input "$@" >>"$log" 2>&1; }

install_torch_for_cpu() {
  # On Linux the registry's ordinary torch needs several GB of CUDA packages. A machine without a GPU
  # takes the CPU build of the same version, where pip is set up to find one (PIP_EXTRA_INDEX_URL).
  local version
  version=$(sed -n 's/^torch==//p' constraints.txt)
  pip_install --no-deps "torch==$version+cpu" && return
  say 'no CPU build of torch where pip looks; the ordinary one is taken, with its CUDA packages (several GB).' \
    "To avoid that, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds and start again."
}

explain_failure() {
  local unreachable='name resolution|Name or service not known|Connection refused|Network is unreachable'
  unreachable+='|Failed to establish|Max retries|ProxyError|[Tt]imed out|NewConnectionError|No route to host'
  if grep -qE "$unreachable" "$log"; then
    fail 'packages could not be downloaded: no package registry can be reached. Is this machine offline?' \
      'The first set-up needs a network (or a local mirror in the settings of pip); later runs need none.' \
      "Run the same command again to continue. The output of pip is in $log"
  fi
  grep -E '^ *(ERROR|error):' "$log" | sed -E 's#[a-z]+://[^ ]*#(address)#g' | tail -n 5 >&2 || true
  fail "packages could not be installed. The output of pip is in $log"
}

install() {
  local extras=test
  export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_RETRIES="${PIP_RETRIES:-2}"
  rm -f "$stamp"
  : >"$log"
  say 'installing the pinned packages (a few minutes the first time)'
  if [[ $gpu == yes ]]; then
    extras=test,gpu
  elif [[ $(uname -s) == Linux ]] && ! "$python" -c 'import torch' 2>/dev/null; then
    install_torch_for_cpu
  fi
  pip_install -c constraints.txt -e ".[$extras]" || explain_failure
  "$python" -c 'import cv2, torch, tuner' 2>>"$log" || fail "the packages do not import. The error is at the end of $log"
}

gpu=no
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  gpu=yes
fi
if usable_venv; then
  if [[ -f $stamp && $(<"$stamp") == "$(wanted_stamp)" ]]; then
    say '.venv is up to date'
    exit 0
  fi
else
  make_venv
fi
start=$SECONDS
install
wanted_stamp >"$stamp.part"
mv "$stamp.part" "$stamp"
say ".venv is ready after $((SECONDS - start)) s: Python $("$python" -c 'import platform, torch; print(platform.python_version() + ", torch " + torch.__version__)')"
