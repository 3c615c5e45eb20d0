#!/usr/bin/env bash
# Install the packages of package-lock.json, and Debian's Node where there is none.
set -euo pipefail
cd "$(dirname "$0")"
if ! command -v npm >/dev/null && command -v apt-get >/dev/null; then
  sudo=$([ "$(id -u)" = 0 ] || echo sudo)
  $sudo apt-get update -qq && $sudo apt-get install -y -qq --no-install-recommends nodejs npm >/dev/null
fi
if [ ! node_modules -nt package-lock.json ]; then
  npm ci --silent --no-audit --no-fund
  touch node_modules
fi
