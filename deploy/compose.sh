#!/usr/bin/env bash
# The system in containers, from nothing to a completion and back. A project and port of its own: one that is up already is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
export COMPOSE_PROJECT_NAME=tolhouse-check GATEWAY_PORT=${GATEWAY_PORT:-18000}
trap 'status=$?; ((status == 0)) || docker compose logs --tail 50 >&2; docker compose down --volumes; exit $status' EXIT

docker compose up --detach --build --wait
python3 - "http://127.0.0.1:$GATEWAY_PORT/v1/completions" <<'PY'
import json, sys, urllib.request

body = json.dumps({"prompt": "def __init__(self", "max_tokens": 32, "temperature": 0}).encode()
request = urllib.request.Request(sys.argv[1], body, {"Content-Type": "application/json"})
with urllib.request.urlopen(request, timeout=60) as answer:
    text = json.load(answer)["choices"][0]["text"]
print(f"completion: {text!r}")
if not text.strip():
    sys.exit("error: the completion is empty")
PY
