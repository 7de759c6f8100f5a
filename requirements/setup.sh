#!/usr/bin/env bash
# Makes .venv ready: creates it, installs the pinned requirements and the project. A second run finds its stamp and
# does nothing. Environment:
#   RECSYS_BASE_PYTHON   interpreter to make .venv from (default: the first of python3, python3.12, ... that is >= 3.10)
#   RECSYS_BUILD         cpu or cuda: which build of fbgemm (default: cuda where nvidia-smi sees a GPU)
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) apply. On a machine without a GPU the index of PyTorch's CPU
# wheels as an extra index saves a download of several GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "setup: $*" >&2
  exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in ${RECSYS_BASE_PYTHON:-python3 python3.12 python3.11 python3.13 python3.10}; do
    if is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "needs Python 3.10 or newer, tried: ${RECSYS_BASE_PYTHON:-python3, python3.12, python3.11, python3.13, python3.10}." \
    "Install one, or name it: RECSYS_BASE_PYTHON=/path/to/python make setup"
}

build=${RECSYS_BUILD:-}
if [ -z "$build" ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then build=cuda; else build=cpu; fi
fi
[ "$build" = cpu ] || [ "$build" = cuda ] || fail "RECSYS_BUILD is '$build': allowed are cpu and cuda"

# The project's files count too: an editable install records the packages and their version. So does the place: a
# moved checkout needs a new one.
key="$build $PWD $(cat requirements/*.txt requirements/setup.sh setup.cfg pyproject.toml | cksum)"
stamp=.venv/.recsys-setup
if [ -x .venv/bin/python ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
  exit 0
fi

started=$SECONDS
if [ ! -x .venv/bin/python ]; then
  python=$(find_python)
  echo "setup: creating .venv with $("$python" --version)"
  "$python" -m venv .venv ||
    fail "'$python -m venv .venv' failed. On Debian and Ubuntu it needs the package python3-venv"
fi
is_new_enough .venv/bin/python || fail ".venv has a Python older than 3.10, or a broken one: remove .venv and try again"
rm -f "$stamp"

# -I: an interpreter that ignores PYTHONPATH, so that pip looks at .venv only.
pip() { .venv/bin/python -I -m pip --disable-pip-version-check "$@"; }

echo "setup: installing the requirements ($build build); the first time this takes a few minutes"
# Without compiling: Python compiles what is imported when it is, a small part of what is installed.
pip install --quiet --no-compile -r requirements/base.txt -r requirements/dev.txt
pip install --quiet --no-compile --no-deps -r "requirements/nodeps-$build.txt"
pip install --quiet --no-deps --no-build-isolation --editable .
.venv/bin/python -c 'import torch, fbgemm_gpu, torchrec, recsys' || fail "the installed packages don't load, see above"

echo "$key" >"$stamp"
echo "setup: done in $((SECONDS - started)) s"
