#!/usr/bin/env bash
# The system in containers, from nothing to a completion, through some load, and back: `deploy/compose.sh`, or with `cluster`
# on a Redis Cluster. A project and port of its own: one that is up already is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
export COMPOSE_PROJECT_NAME=tolhouse-check GATEWAY_PORT=${GATEWAY_PORT:-18000} COMPOSE_PROFILES=${1:-}
case $COMPOSE_PROFILES in
  "") ;;
  cluster) export STORE=redis://redis-cluster:6379 ;;
  *) echo "usage: deploy/compose.sh [cluster]" >&2; exit 2 ;;
esac
trap 'status=$?; ((status == 0)) || docker compose logs --tail 50 >&2; docker compose down --volumes; exit $status' EXIT

docker compose --profile load build
docker compose up --detach --wait
no_proxy=127.0.0.1 python3 - "http://127.0.0.1:$GATEWAY_PORT/v1/completions" <<'PY'
import json, sys, urllib.request

body = json.dumps({"prompt": "def __init__(self", "max_tokens": 32, "temperature": 0}).encode()
request = urllib.request.Request(sys.argv[1], body, {"Content-Type": "application/json"})
with urllib.request.urlopen(request, timeout=60) as answer:
    text = json.load(answer)["choices"][0]["text"]
print(f"completion: {text!r}")
if not text.strip():
    sys.exit("error: the completion is empty")
PY
load=$(docker compose run --rm --no-deps load --quick)
echo "$load"
grep -q '"errors": {}' <<<"$load" || { echo "error: not every request was answered" >&2; exit 1; }
docker compose stop
failed=$(docker compose ps --all --format '{{.Service}} {{.ExitCode}}' | awk '$2 != 0')
[ -z "$failed" ] || { echo "error: did not end with 0: $failed" >&2; exit 1; }
if docker compose logs | grep Traceback; then echo "error: a traceback in the logs" >&2; exit 1; fi
