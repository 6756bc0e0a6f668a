#!/usr/bin/env bash
# Sets up with the test tools, then runs every check that needs no GPU: ruff, mypy, pytest.
#
#   tests/run.sh                   all checks
#   tests/run.sh tests/unit -k p   arguments go to pytest; -m replaces "not gpu and not nightly"
#
# Every check runs even if one before it fails. Exits with 1 if any failed.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# shellcheck source=launch/setup.sh
source launch/setup.sh

summary=()
failed=0

step() { # NAME COMMAND...
    local name=$1 start=$SECONDS outcome=ok
    shift
    printf '\n== %s\n' "$name"
    "$@" </dev/null || outcome=FAILED
    [ "$outcome" = ok ] || failed=1
    summary+=("$(printf '%-14s %-6s %4d s' "$name" "$outcome" "$((SECONDS - start))")")
}

finish() {
    printf '\n== summary\n'
    printf '%s\n' "${summary[@]}"
    exit "$failed"
}

# mypy finds modules by folder, so it is shown the folders as they are installed, through links.
types() {
    local tree=.mypy_cache/tree
    rm -rf "$tree"
    mkdir -p "$tree/twilight_sgl"
    ln -s "$PWD"/twilight_sgl/* "$PWD/kernels" "$PWD/patches" "$tree/twilight_sgl/"
    (cd "$tree" && "$TWILIGHT_VENV/bin/mypy" --config-file "$OLDPWD/pyproject.toml" \
        --cache-dir "$OLDPWD/.mypy_cache" -p twilight_sgl)
}

show_when_done() { # PROCESS LOG
    local status=0
    wait "$1" || status=$?
    cat "$2"
    return "$status"
}

step set-up twilight_setup test
[ "$failed" = 0 ] || finish
bin=$TWILIGHT_VENV/bin
step "ruff check" "$bin/ruff" check .
step "ruff format" "$bin/ruff" format --check .
step mypy types
export OMP_NUM_THREADS=1 # threads that wait for each other are slow where tests share the cores
selected=(-m "not gpu and not nightly")
if [ $# -gt 0 ]; then
    step pytest "$bin/pytest" "${selected[@]}" "$@"
    finish
fi
# Server tests mostly wait for one core: the other tests run beside them.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$bin/pytest" "${selected[@]}" tests/server >"$log" 2>&1 </dev/null &
servers=$!
step "other tests" "$bin/pytest" "${selected[@]}" --ignore=tests/server
step "server tests" show_when_done "$servers" "$log"
finish
