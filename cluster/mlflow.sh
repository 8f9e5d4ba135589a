#!/usr/bin/env bash
# The head's MLflow server, on loopback, behind a password: mlflow.sh start FOLDER | mlflow.sh stop
# Database and password are in FOLDER, which outlives the head; artifacts are in $RMSWEEP_STORAGE/mlflow.
set -euo pipefail
. ~/.rmsweep.sh
umask 077
pid_file=~/.mlflow/server.pid

stop() {
  [ -s "$pid_file" ] || return 0
  pid=$(cat "$pid_file")
  rm "$pid_file"
  # After a reboot the number may be another process's.
  grep -qsa mlflow "/proc/$pid/cmdline" || return 0
  kill -- "-$pid"
  for _ in $(seq 100); do kill -0 -- "-$pid" 2>/dev/null || return 0; sleep 0.1; done
  kill -KILL -- "-$pid"
}

start() {
  folder=$1
  mkdir -p "$folder" ~/.mlflow
  for name in password secret; do
    [ -s "$folder/$name" ] || python -c 'import secrets; print(secrets.token_urlsafe(24))' > "$folder/$name"
  done
  # Where MLflow's clients look for it, ours and the user's.
  printf '[mlflow]\nmlflow_tracking_username = admin\nmlflow_tracking_password = %s\n' "$(cat "$folder/password")" > ~/.mlflow/credentials
  printf '[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///%s\nauth_cache_ttl_seconds = 60\n' "$folder/users.db" > "$folder/auth.ini"
  export MLFLOW_AUTH_CONFIG_PATH=$folder/auth.ini MLFLOW_AUTH_ADMIN_USERNAME=admin
  MLFLOW_AUTH_ADMIN_PASSWORD=$(cat "$folder/password") MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$folder/secret")
  export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
  # A session of its own: the ssh connection that starts it will close.
  setsid mlflow server --app-name basic-auth --host 127.0.0.1 --port "${MLFLOW_TRACKING_URI##*:}" --workers 1 \
    --backend-store-uri "sqlite:///$folder/mlflow.db" --artifacts-destination "$RMSWEEP_STORAGE/mlflow" \
    > "$folder/server.log" 2>&1 < /dev/null &
  pid=$!
  echo "$pid" > "$pid_file"
  for _ in $(seq 120); do
    curl --silent --fail --max-time 5 --output /dev/null "$MLFLOW_TRACKING_URI/health" && return 0
    kill -0 "$pid" 2>/dev/null || break
    sleep 1
  done
  echo "error: the MLflow server did not come up; the end of $folder/server.log:" >&2
  tail -n 20 "$folder/server.log" >&2
  return 1
}

case ${1:-} in
  start) stop; start "${2:?usage: mlflow.sh start FOLDER}" ;;
  stop) stop ;;
  *) echo "usage: mlflow.sh start FOLDER | stop" >&2; exit 2 ;;
esac
