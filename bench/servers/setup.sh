#!/usr/bin/env bash
# setup.sh DIR [SERVER…]: what the benchmark needs that is not there yet: wrk and Java (Debian, as root), and one virtual
# environment per server under DIR/venvs, of all servers or of those named. torch goes in first, pinned, so that nothing pulls another build.
# `mlserve@REV` is this project at an earlier commit.
set -euo pipefail
dir=$1; shift
wanted=" $* "
here=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$dir"/{venvs,models,logs,work}
missing=()
command -v wrk >/dev/null || missing+=(wrk)
command -v java >/dev/null || missing+=(openjdk-17-jre-headless)
[ -x /usr/bin/python3.11 ] && /usr/bin/python3.11 -c 'import ensurepip' 2>/dev/null || missing+=(python3.11-venv)
if [ ${#missing[@]} -gt 0 ]; then
  echo "bench: installing ${missing[*]}" >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$dir/logs/apt.log" 2>&1 \
    || { echo "bench: apt-get could not install ${missing[*]}; read $dir/logs/apt.log" >&2; exit 7; }
fi
cd "$dir/venvs"
mk() { # name, interpreter, packages
  local name=$1 python=$2; shift 2
  [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
  [ -f "$name/.installed" ] && return
  echo "bench: installing $name" >&2
  "$python" -m venv --clear "$name"
  "$name/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 numpy
  [ $# -eq 0 ] || "$name/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 "$@"
  touch "$name/.installed"
}
# mlserve as an image has it: what the server needs, and no more; installed anew each time, since it may have changed
install=(bash "$here/.ci/install")
rm -rf mlserve && "${install[@]}" "$PWD/mlserve" -c constraints.txt --no-build-isolation "$here[serving,torch]"
rm -rf "$here/build"
for name in $wanted; do
  [[ $name == mlserve@* && ! -f $name/.installed ]] || continue
  source=$(mktemp -d)
  git -C "$here" archive "${name#mlserve@}" | tar -x -C "$source"
  "${install[@]}" "$PWD/$name" -c constraints.txt --no-build-isolation "$source[serving,torch]"
  rm -rf "$source"
  touch "$name/.installed"
done
mk fastapi python3 fastapi==0.165.0 'uvicorn[standard]==0.54.0' orjson msgspec
mk litserve python3 litserve==0.2.19
mk bentoml python3 bentoml==1.4.39
# uvloop 0.22 and later break the worker process of MLServer 1.7.1: no current event loop
mk mlserver python3 mlserver==1.7.1 uvloop==0.21.0
mk torchserve python3 torchserve==0.12.0 torch-model-archiver psutil pyyaml
# the Python stub of Triton 2.51 embeds a CPython below 3.11.6: it runs with Debian's 3.11.2
mk triton "${TRITON_PYTHON:-/usr/bin/python3.11}" nvidia-pytriton==0.7.0
mk ray python3 'ray[serve]==2.60.0'
mk mlflow python3 mlflow==3.17.2
