#!/usr/bin/env bash
# Sets a node up, and again where it is up already: setup.sh STORAGE [DISK]
# DISK is where the image mounts the node's own fast disk, if it has one: models and artifacts are fetched to it, since a few of
# them fill the root. Installs the pinned packages into .venv of this checkout, and writes what every shell and every Ray process must know.
set -euo pipefail
storage=${1:?usage: setup.sh STORAGE [DISK]}
disk=${2:-}
case $storage in
  *YOUR-*) echo "error: $storage is a placeholder; edit line [5] of cluster.yaml" >&2; exit 2 ;;
esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

[ -x "$root/.venv/bin/python" ] || python3 -m venv "$root/.venv"
"$root/.venv/bin/python" -m pip install --quiet --constraint "$root/requirements.lock" --editable "$root[cluster]"

# The tracking server is the head's own: only the driver writes to it, and the driver runs on the head.
# A training writes a checkpoint when it is stopped: `ray job stop` must wait for longer than --grace-s.
cat > ~/.rmsweep.sh <<END
export PATH="$root/.venv/bin:\$PATH"
export RMSWEEP_STORAGE="$storage"
export MLFLOW_TRACKING_URI="http://127.0.0.1:${MLFLOW_PORT:-5000}"
export RAY_AUTH_MODE=token
export RAY_JOB_STOP_WAIT_TIME_S=60
END
# The hub's token stays where it was mounted, which nobody else can read.
if [ -n "$disk" ] && [ -d "$disk" ]; then
  sudo mkdir -p "$disk/rmsweep"
  sudo chown "$(id -u):$(id -g)" "$disk/rmsweep"
  cat >> ~/.rmsweep.sh <<END
export HF_HOME="$disk/rmsweep/huggingface"
export HF_TOKEN_PATH="$HOME/.cache/huggingface/token"
export RMSWEEP_CACHE="$disk/rmsweep/cache"
END
fi
grep -qsF .rmsweep.sh ~/.bashrc || echo '. ~/.rmsweep.sh' >> ~/.bashrc
