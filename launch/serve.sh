#!/usr/bin/env bash
# Sets up, then runs the server; every argument goes to it as it is.
#
#   launch/serve.sh                        the embedded small model on 127.0.0.1:30000
#   launch/serve.sh --model-path PATH ...  a model of yours, with any SGLang or Twilight flag
#   launch/serve.sh --help                 every flag
#
# Ctrl-C (or SIGTERM) stops the server and everything it started; a second one does so at once.
# TWILIGHT_STOP_SECONDS (default 30): how long a stopping server may take to finish.
# SGLANG_VERSION, TWILIGHT_PYTHON: see setup.sh.

set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
twilight_setup
python=$TWILIGHT_VENV/bin/python
# Without this the working folder is searched first, where kernels/ hides a package of that name.
export PYTHONSAFEPATH=1

for argument in "$@"; do
    case $argument in
        -h | --help) exec "$python" -m twilight_sgl.launch_server "$@" ;;
    esac
done

# Prints the value of flag --$1 among the server's arguments, else in its --config file, else $2.
flag_value() {
    local name=$1 default=$2 value="" config="" previous="" argument
    for argument in "${arguments[@]}"; do
        case $previous in
            "--$name") value=$argument ;;
            --config) config=$argument ;;
        esac
        case $argument in
            "--$name="*) value=${argument#*=} ;;
            --config=*) config=${argument#*=} ;;
        esac
        previous=$argument
    done
    if [ -z "$value" ] && [ -f "$config" ]; then
        value=$(sed -nE "s/^$name:[[:space:]]*[\"']?([^\"'#[:space:]]+).*/\1/p" "$config" | tail -n 1)
    fi
    echo "${value:-$default}"
}

# Waits until the server answers at $1 or process $2 is gone; then says what to try. $3: API key.
announce() {
    "$python" - "$@" <<'EOF'
import os, sys, time, urllib.error, urllib.request

url, server, api_key = sys.argv[1], int(sys.argv[2]), sys.argv[3]
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def answers(path):
    request = urllib.request.Request(url + path)
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with opener.open(request, timeout=30):
            return True
    except (OSError, ValueError):
        return False


while not (answers("/v1/models") and answers("/health_generate")):
    try:
        os.kill(server, 0)
    except ProcessLookupError:
        sys.exit()
    time.sleep(1)

key = " -H 'Authorization: Bearer YOUR_API_KEY'" if api_key else ""
question = '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
print(
    f"""
Twilight is ready at {url}. Try:

  curl -s {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{question}'

Budgets, under internal_states[0].twilight:

  curl -s {url}/server_info{key} | python3 -m json.tool
""",
    file=sys.stderr,
    flush=True,
)
EOF
}

# Prints the process ids of everything that process $1 started, directly or not.
descendants() {
    local child
    for child in $(cat /proc/"$1"/task/*/children 2>/dev/null); do
        echo "$child"
        descendants "$child"
    done
}

# Ends the announcer and what is left of the server. $1: the signal to ask it with, if it still runs.
stop_all() {
    local signal=${1:-} started deadline
    trap 'deadline=0' INT TERM HUP # again: do not wait
    if [ -n "$announcer" ]; then kill -KILL -- "-$announcer" 2>/dev/null || true; fi
    if [ -z "$server" ]; then return; fi
    started=$(descendants "$server")
    if [ -n "$signal" ]; then
        deadline=$((SECONDS + ${TWILIGHT_STOP_SECONDS:-30}))
        kill "-$signal" "$server" 2>/dev/null || true
        while kill -0 "$server" 2>/dev/null && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.2; done
    fi
    # The group holds all but what put itself in a session of its own.
    # shellcheck disable=SC2086
    kill -KILL -- "-$server" $started 2>/dev/null || true
    wait 2>/dev/null || true
}

arguments=("$@")
host=$(flag_value host 127.0.0.1)
case $host in
    0.0.0.0) host=127.0.0.1 ;;
    ::) host="[::1]" ;;
    *:*) host="[$host]" ;;
esac
url=http://$host:$(flag_value port 30000)

server="" announcer=""
trap 'stop_all INT; exit 130' INT
trap 'stop_all TERM; exit 143' TERM HUP

# Job control gives server and announcer a process group each, and leaves SIGINT to be heeded.
set -m
"$python" -m twilight_sgl.launch_server "$@" </dev/null &
server=$!
announce "$url" "$server" "$(flag_value api-key "")" &
announcer=$!
disown "$announcer" # its end is no news
set +m

status=0
wait "$server" || status=$?
stop_all
exit "$status"
