#!/usr/bin/env bash
# Creates a virtual environment at $1, also if Debian's package python3-venv is missing.
set -euo pipefail
venv=$1
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "error: python3 was not found; Tolhouse needs Python 3.11 or later" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Tolhouse needs Python 3.11 or later; $python is $("$python" -V)" >&2; exit 1; }

"$python" -m venv "$venv" 2>/dev/null && exit 0
rm -rf "$venv"
if "$python" -m pip --version >/dev/null 2>&1; then  # without ensurepip, the system's pip can install into the new environment
  "$python" -m venv --without-pip "$venv"
  "$python" -m pip --python "$venv/bin/python" install --quiet pip && exit 0
  rm -rf "$venv"
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
sudo=$([ "$(id -u)" = 0 ] || echo sudo)
if command -v apt-get >/dev/null; then
  echo "· installing the package python$version-venv" >&2
  { $sudo apt-get update -qq && $sudo apt-get install -y -qq --no-install-recommends "python$version-venv"; } >/dev/null
  "$python" -m venv "$venv" && exit 0
fi
echo "error: $python can't create virtual environments; install the package python$version-venv" >&2
exit 1
