#!/usr/bin/env bash
# gpu_check.sh DIR [arguments of gpu_check.py]: the check on a machine with torch and no network, from a copy of this tree that has the wheels of
# `make gpu-wheels` with it in state/gpu-wheels. Results are in DIR, at most eight minutes later.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1; shift
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
wheels=(state/gpu-wheels/*.whl)
# unpacked, not installed: no pip is needed, and one wheel that does not fit this Python spoils only its own import
[ ! -e "${wheels[0]}" ] || python3 -c 'import sys, zipfile; [zipfile.ZipFile(w).extractall(sys.argv[1]) for w in sys.argv[2:]]' "$site" "${wheels[@]}"
python3 -m compileall -q -j 0 "$site" mlserve bench > "$site/compiled.log" || true # once, and not in each of thirty processes
PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" python3 bench/gpu_check.py --out "$out" "$@"
