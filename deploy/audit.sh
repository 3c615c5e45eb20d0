#!/usr/bin/env bash
# Lists known vulnerabilities of the pinned packages with pip-audit. Fails if there is one, and if packages could not be
# looked up. AUDIT_SERVICE=osv uses osv.dev instead of PyPI.
set -uo pipefail
cd "$(dirname "$0")/.."
report=$(mktemp)
trap 'rm -f "$report" "$report.log"' EXIT
"$1" --vulnerability-service "${AUDIT_SERVICE:-pypi}" --requirement constraints.txt --no-deps --disable-pip --progress-spinner off \
  --format json --output "$report" 2>"$report.log"
python3 - "$report" "$report.log" <<'PYTHON'
import json, pathlib, sys

try:
    found = json.loads(pathlib.Path(sys.argv[1]).read_text())["dependencies"]
except (ValueError, KeyError):
    log = pathlib.Path(sys.argv[2]).read_text().strip().splitlines()
    sys.exit(f"audit: the vulnerability service can't be reached; nothing was audited ({(log[-1] if log else 'no answer')[:200]})")
bad = [(d["name"], d["version"], v) for d in found for v in d.get("vulns", ())]
unseen = [d["name"] for d in found if "skip_reason" in d]
for name, version, vulnerability in bad:
    print(f"{name} {version}: {vulnerability['id']}, fixed in {', '.join(vulnerability['fix_versions']) or 'no version yet'}")
print(f"audit: {len(found) - len(unseen)} of {len(found)} packages were looked up, {len(bad)} known vulnerabilities")
if unseen:
    sys.exit(f"audit: not in the service's database, or the service can't be reached: {', '.join(unseen[:5])}{' …' * (len(unseen) > 5)}")
sys.exit(bool(bad))
PYTHON
