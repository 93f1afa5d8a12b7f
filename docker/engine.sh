#!/usr/bin/env bash
# A Docker Engine, a registry on loopback, a base image, a proxy and Docker Compose, for a machine that has none of them.
#   engine.sh start   use the engine that answers (DOCKER_HOST, context), else install and start a private one
#   engine.sh stop    end what `start` started, by pid
#   engine.sh debug-base   make the base that `mlserve debug` adds to an image: a shell, strace, gdb, curl
#   engine.sh env     print NAME=value lines a shell can export
# What it starts keeps its data under state/ of this project and leaves the host's firewall alone.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
state=${MLSERVE_STATE:-$here/state}
dir=$state/engine
run=/run/mlserve-$(printf %s "$dir" | sha256sum | cut -c1-8) # short: a socket's path may have 107 bytes
log=$dir/dockerd.log

say() { printf '%s\n' "engine: $*" >&2; }
fail() { # message, mend
  say "$1 $2"
  printf '{"code": 7, "step": "engine", "error": "%s %s", "resume": "make engine-start"}\n' "$1" "$2" >&2
  exit 7
}
client() { [ -x /usr/bin/docker ] && echo /usr/bin/docker || echo docker; } # Debian's own drives the engine's BuildKit; another may stand earlier on PATH
ours() { # PIDFILE FOLDER: whether that process works in our folder; after a kill the number may be a stranger's, or a zombie's, which has no command line
  [ -s "$1" ] && { tr '\0' ' ' <"/proc/$(cat "$1")/cmdline" | grep -qF -- "$2/"; } 2>/dev/null
}
alive() { ours "$dir/$1.pid" "$dir"; }
free_port() { python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])'; }
answers() { timeout 10 docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }

install_packages() { # COMMAND:PACKAGE …, for commands that are not here
  local missing=() pair
  for pair in "$@"; do PATH=$PATH:/usr/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}"); done
  [ ${#missing[@]} -eq 0 ] && return
  [ "$(id -u)" = 0 ] || fail "${missing[*]} is not installed here, and installing it needs root." "Run apt-get install ${missing[*]} as root."
  say "installing ${missing[*]} with apt-get"
  apt-get update -qq >"$dir/apt.log" 2>&1 || fail "apt-get update failed." "Read $dir/apt.log."
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >>"$dir/apt.log" 2>&1 \
    || fail "apt-get could not install ${missing[*]}." "Read $dir/apt.log."
}

run_dockerd() { # until it is asked to end; one that crashed is started again, as by systemd, and what it ended with is kept
  local below=$run/exec/containerd/containerd.pid began code # of a dockerd that was killed; the next one would wait for it, dead or not
  while began=$SECONDS; do
    if ours "$below" "$run"; then kill -KILL "$(cat "$below")"; fi
    rm -f "$run/docker.pid" "$run/docker.sock" "$below"
    # loopback publishing needs no firewall rule
    dockerd --data-root "$dir/data" --exec-root "$run/exec" --pidfile "$run/docker.pid" -H "unix://$run/docker.sock" \
      --bridge none --iptables=false --ip-forward=false --ip-masq=false >>"$log" 2>&1 </dev/null &
    echo $! >"$dir/dockerd.pid"
    code=0; wait $! || code=$?
    [ $code != 0 ] && [ $((SECONDS - began)) -ge 3 ] || return $code # it was asked to, or cannot start
    { printf 'dockerd ended with %s at %s; it is started again\n' $code "$(date -u +%FT%TZ)"
      grep -aE -A 12 '^(panic|fatal error|SIG[A-Z]+): ' "$log" | tail -n 13 || true
      dmesg 2>/dev/null | grep -i 'killed process.*dockerd' | tail -n 1 || true; } >>"$dir/crashes"
  done
}

start_dockerd() {
  if ! alive supervisor; then
    stop_one dockerd # of a supervisor that was killed
    say "starting dockerd, data under $dir/data"
    mkdir -p "$dir/data" "$run"
    : >"$log"; rm -f "$dir/crashes"
    # its own session, so that it outlives this shell
    setsid bash "$here/docker/engine.sh" run-dockerd "$dir/dockerd.pid" >/dev/null 2>&1 </dev/null &
    echo $! >"$dir/supervisor.pid"
  fi
  for _ in $(seq 120); do
    timeout 10 "$(client)" -H "unix://$run/docker.sock" info >/dev/null 2>&1 && return
    kill -0 "$(cat "$dir/supervisor.pid")" 2>/dev/null || fail "dockerd ended while starting." "Read $log."
    sleep 0.5
  done
  fail "dockerd did not answer in 60 s." "Read $log."
}

start_registry() {
  [ -s "$dir/registry.port" ] || free_port >"$dir/registry.port"
  local port; port=$(cat "$dir/registry.port")
  if ! alive registry; then
    say "starting a registry on 127.0.0.1:$port, data under $state/registry"
    mkdir -p "$state/registry"
    printf '%s\n' 'version: 0.1' 'log: {level: warn}' "storage: {filesystem: {rootdirectory: $state/registry}, delete: {enabled: true}}" \
      "http: {addr: 127.0.0.1:$port}" >"$dir/registry.yml"
    setsid docker-registry serve "$dir/registry.yml" >"$dir/registry.log" 2>&1 </dev/null &
    echo $! >"$dir/registry.pid"
  fi
  for _ in $(seq 40); do
    python3 -c "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:$port/v2/',timeout=2)" 2>/dev/null && return
    sleep 0.25
  done
  fail "The registry did not answer on 127.0.0.1:$port." "Read $dir/registry.log."
}

debian_image() { # NAME PACKAGES: an image of Debian's packages, pushed; its digest goes to $dir/NAME
  local registry=${MLSERVE_REGISTRY:-127.0.0.1:$(cat "$dir/registry.port" 2>/dev/null)} ref from=(--variant=minbase)
  ref=$registry/mlserve/$1
  install_packages mmdebstrap:mmdebstrap
  if [ -s "$dir/base.tar" ] && [ "$1" != base ]; then from=(--variant=custom --setup-hook="tar-in '$dir/base.tar' /"); fi # what the base has is not installed again
  SOURCE_DATE_EPOCH=0 mmdebstrap --quiet --format=tar "${from[@]}" --include="$2" bookworm "$dir/$1.tar.part" >"$dir/$1.log" 2>&1 \
    || fail "mmdebstrap failed." "Read $dir/$1.log."
  mv "$dir/$1.tar.part" "$dir/$1.tar"
  "${docker[@]}" import "$dir/$1.tar" "$ref:bookworm" >/dev/null
  "${docker[@]}" push -q "$ref:bookworm" >/dev/null || fail "The image $1 could not be pushed to $registry." "See that it runs; its log is $dir/registry.log."
  [ "$1" = base ] || rm -f "$dir/$1.tar"
  "${docker[@]}" inspect --format '{{index .RepoDigests 0}}' "$ref:bookworm" >"$dir/$1"
}

start_base() { # the official slim image where a registry can be reached, else one from Debian's packages
  if [ -s "$dir/base" ]; then # and it is there
    "${docker[@]}" inspect "$(cat "$dir/base")" >/dev/null 2>&1 && return
    timeout 60 "${docker[@]}" pull -q "$(cat "$dir/base")" >/dev/null 2>&1 && return
    say "the base image $(cat "$dir/base") is gone"
  fi
  local official=python:3.11-slim-bookworm
  say "looking for the base image $official"
  if timeout 60 "${docker[@]}" pull -q "$official" >/dev/null 2>&1; then
    "${docker[@]}" inspect --format '{{index .RepoDigests 0}}' "$official" >"$dir/base"; return
  fi
  say "no registry serves it here; making a base image from Debian's packages"
  debian_image base python3,python3-venv,ca-certificates
}

debug_base() { # made like the base, with the tools of somebody who looks into a container
  mkdir -p "$dir"
  local docker=(docker)
  [ -S "$run/docker.sock" ] && docker=("$(client)" -H "unix://$run/docker.sock")
  if [ -s "$dir/debug" ] && "${docker[@]}" inspect "$(cat "$dir/debug")" >/dev/null 2>&1; then cat "$dir/debug"; return; fi
  [ -n "${MLSERVE_REGISTRY:-}" ] || [ -s "$dir/registry.port" ] || fail "No registry is there to hold the debug base." "Run make engine-start, or set MLSERVE_REGISTRY."
  say "making the debug base from Debian's packages"
  debian_image debug python3,python3-venv,ca-certificates,strace,gdb,curl,procps,iproute2
  cat "$dir/debug"
}

start_proxy() { # a small image with Debian's haproxy, for `mlserve deploy` and `mlserve render`
  [ -z "${MLSERVE_PROXY_IMAGE:-}" ] && [ ! -s "$dir/proxy" ] || return 0
  [ -f /etc/debian_version ] || { say "no image of a proxy is made here; name one by its digest: proxy = in [deploy], or MLSERVE_PROXY_IMAGE"; return 0; }
  say "making the image of a proxy from Debian's haproxy"
  debian_image proxy haproxy
}

composes() { "$@" version --short 2>/dev/null | grep -qE '^v?([3-9]|[1-9][0-9]|2\.([2-9][0-9]))\b'; } # the oldest that was tried is 2.26
start_compose() { # Docker Compose, unpacked beside the engine where none is installed; nothing else needs it
  [ -n "${MLSERVE_COMPOSE:-}" ] || [ -x "$dir/docker-compose" ] || composes docker compose || composes docker-compose && return
  local apt=$dir/apt options deb version=2.26.1-4 keys=/usr/share/keyrings/debian-archive-keyring.gpg
  mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
  echo "deb [signed-by=$keys] http://deb.debian.org/debian trixie main" >"$apt/sources.list"
  options=(-qq -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt/cache"
    -o Acquire::Languages=none -o APT::Sandbox::User=root)
  say "fetching Docker Compose $version of Debian 13"
  # Debian 12 has 1.29 only; the newer program needs nothing but the C library
  if apt-get "${options[@]}" update >"$apt/log" 2>&1 && (cd "$apt" && apt-get "${options[@]}" download "docker-compose=$version") >>"$apt/log" 2>&1 \
    && deb=$(ls "$apt"/docker-compose_*.deb) && dpkg -x "$deb" "$apt/unpacked" 2>>"$apt/log" \
    && composes "$apt/unpacked/usr/libexec/docker/cli-plugins/docker-compose"; then
    mv "$apt/unpacked/usr/libexec/docker/cli-plugins/docker-compose" "$dir/docker-compose"; rm -rf "$apt"
  else say "Docker Compose could not be had (read $apt/log); all but mlserve deploy compose works without it"; fi
}

start() {
  mkdir -p "$dir"
  docker=(docker)
  local theirs=
  if [ -z "${MLSERVE_PRIVATE_ENGINE:-}" ] && ! alive dockerd && answers; then
    theirs=yes; say "using the Docker Engine that answers"
    [ -n "${MLSERVE_REGISTRY:-}" ] && [ -n "${MLSERVE_BASE:-}" ] && { start_compose; return; }
  fi
  if [ -z "$theirs" ] || [ -z "${MLSERVE_REGISTRY:-}" ]; then
    [ -f /etc/debian_version ] || fail "No Docker Engine answers, and this is not Debian or Ubuntu." "Install Docker Engine, start it, and set DOCKER_HOST or a docker context."
    local needed=(docker-registry:docker-registry mmdebstrap:mmdebstrap)
    if [ -z "$theirs" ]; then
      [ "$(id -u)" = 0 ] || fail "No Docker Engine answers, and installing one needs root." "Start Docker Engine and add yourself to the docker group, or run make as root."
      needed+=(dockerd:docker.io)
    elif [ "$(id -u)" != 0 ] && ! command -v docker-registry >/dev/null; then
      fail "An engine answers, but no registry to push to is named, and installing one needs root." \
        "Start one with docker run -d -p 127.0.0.1:5000:5000 registry:2, and set MLSERVE_REGISTRY=127.0.0.1:5000."
    fi
    install_packages "${needed[@]}"
    [ -n "$theirs" ] || { start_dockerd; docker=("$(client)" -H "unix://$run/docker.sock"); }
    start_registry
  fi
  start_compose & # which waits for the network, and so do the images
  local compose=$!
  start_base
  start_proxy
  wait "$compose"
  say "ready: $(cat "$dir/base")"
}

stop_one() { # name: TERM, then KILL after 15 s
  local pid
  [ -s "$dir/$1.pid" ] || return 0
  pid=$(cat "$dir/$1.pid")
  if alive "$1" && kill -TERM "$pid" 2>/dev/null; then
    for _ in $(seq 60); do kill -0 "$pid" 2>/dev/null || break; sleep 0.25; done
    kill -KILL "$pid" 2>/dev/null || true
    say "stopped $1 ($pid)"
  fi
  rm -f "$dir/$1.pid"
}

env_lines() {
  [ -S "$run/docker.sock" ] && alive dockerd && echo "DOCKER_HOST=unix://$run/docker.sock"
  [ -n "${MLSERVE_REGISTRY:-}" ] && echo "MLSERVE_REGISTRY=$MLSERVE_REGISTRY" \
    || { [ -s "$dir/registry.port" ] && echo "MLSERVE_REGISTRY=127.0.0.1:$(cat "$dir/registry.port")"; }
  [ -n "${MLSERVE_BASE:-}" ] && echo "MLSERVE_BASE=$MLSERVE_BASE" || { [ -s "$dir/base" ] && echo "MLSERVE_BASE=$(cat "$dir/base")"; }
  [ -n "${MLSERVE_DEBUG_BASE:-}" ] && echo "MLSERVE_DEBUG_BASE=$MLSERVE_DEBUG_BASE" || { [ -s "$dir/debug" ] && echo "MLSERVE_DEBUG_BASE=$(cat "$dir/debug")"; }
  [ -n "${MLSERVE_PROXY_IMAGE:-}" ] && echo "MLSERVE_PROXY_IMAGE=$MLSERVE_PROXY_IMAGE" || { [ -s "$dir/proxy" ] && echo "MLSERVE_PROXY_IMAGE=$(cat "$dir/proxy")"; }
  [ -n "${MLSERVE_COMPOSE:-}" ] && echo "MLSERVE_COMPOSE=$MLSERVE_COMPOSE" || { [ -x "$dir/docker-compose" ] && echo "MLSERVE_COMPOSE=$dir/docker-compose"; }
  echo "MLSERVE_STATE=$state"
  echo "MLFLOW_TRACKING_URI=${MLFLOW_TRACKING_URI:-sqlite:///$state/mlflow/mlflow.db}"
}

case "${1:-}" in
  start) start; env_lines >"$dir/env" ;;
  stop)
    # bridges outlive dockerd, and every engine of this machine draws their addresses from the same few pools
    if alive dockerd; then docker -H "unix://$run/docker.sock" network prune -f >/dev/null 2>&1 || true; fi
    stop_one supervisor; stop_one dockerd; stop_one registry # who would start it again ends first
    # dockerd leaves its own network namespace mounted; one that was killed, its data and the layers in it, too
    awk -v a="$dir/data" -v b="$run" '$2 == a || index($2, a "/") == 1 || index($2, b "/") == 1 {print $2}' /proc/mounts | tac | xargs -r umount -l 2>/dev/null || true
    rm -rf "$run"
    ;;
  env) env_lines ;;
  debug-base) debug_base ;;
  run-dockerd) run_dockerd ;; # by `start`
  *) sed -n '2,7p' "$0"; exit 2 ;;
esac
