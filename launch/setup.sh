#!/usr/bin/env bash
# Makes the virtual environment and installs Twilight with SGLang into it; quick when that is done.
#
#   launch/setup.sh [test]       set up, with the test tools if asked
#   source launch/setup.sh       defines twilight_setup [test] for other scripts; it sets
#                                TWILIGHT_VENV to the environment's folder
#
# SGLANG_VERSION=0.5.23   another SGLang release, in a folder of its own (.venv-0.5.23), with
#                         dependencies as that release wants them rather than constraints.txt
# TWILIGHT_PYTHON=PATH    the Python to make the environment with (default: searched for)

twilight_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

_twilight_say() { printf '[twilight] %s\n' "$*" >&2; }

# Succeeds if $1 runs and is a Python that the package supports. A pyenv shim can exist and not run.
_twilight_python_fits() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
        >/dev/null 2>&1 </dev/null
}

# Prints the Python to use, 3.12 first, or fails.
_twilight_find_python() {
    local version candidate
    if [ -n "${TWILIGHT_PYTHON:-}" ]; then
        _twilight_python_fits "$TWILIGHT_PYTHON" || return 1
        echo "$TWILIGHT_PYTHON"
        return
    fi
    for version in 3.12 3.13 3.11 3.10; do
        for candidate in "python$version" \
            "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python \
            "$HOME/.local/share/uv/python/cpython-$version".*/bin/python"$version"; do
            if _twilight_python_fits "$candidate"; then
                echo "$candidate"
                return
            fi
        done
    done
    _twilight_python_fits python3 && echo python3
}

# Prints what an environment must be made from to be up to date, for the extras in $1.
_twilight_fingerprint() {
    "$TWILIGHT_VENV/bin/python" - "$twilight_root" "${SGLANG_VERSION:-}" "$1" <<'EOF'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(repr(sys.argv[1:]).encode())
for name in ("pyproject.toml", "setup.py", "constraints.txt"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
EOF
}

_twilight_make_venv() {
    local python
    if ! python=$(_twilight_find_python); then
        if [ -n "${TWILIGHT_PYTHON:-}" ]; then
            _twilight_say "TWILIGHT_PYTHON=$TWILIGHT_PYTHON does not run or is not Python 3.10 to 3.13."
        else
            _twilight_say "No Python 3.10 to 3.13 was found."
        fi
        _twilight_say "Install one (apt install python3.12 python3.12-venv, pyenv install 3.12 or" \
            "uv python install 3.12), or name it: TWILIGHT_PYTHON=/path/to/python3.12"
        return 1
    fi
    _twilight_say "Making $TWILIGHT_VENV with $("$python" --version 2>&1)."
    if ! "$python" -m venv --clear "$TWILIGHT_VENV" >&2 </dev/null; then
        _twilight_say "$python cannot make virtual environments. On Debian and Ubuntu install its" \
            "venv package (apt install python3-venv), or name another Python in TWILIGHT_PYTHON."
        return 1
    fi
}

# Installs the package, editable, with the extras in $1: with uv, which is fast, or else pip,
# which may be set up for an index or a proxy that uv does not know.
_twilight_install() {
    local python=$TWILIGHT_VENV/bin/python
    local constrain=(-c "$twilight_root/constraints.txt") wanted=()
    if [ -n "${SGLANG_VERSION:-}" ]; then
        constrain=()
        wanted=("sglang==$SGLANG_VERSION")
    fi
    wanted+=(-e "$twilight_root${1:+[$1]}")
    if "$python" -m pip install --quiet --disable-pip-version-check "${constrain[@]}" uv >&2 &&
        "$python" -m uv pip install --python "$python" "${constrain[@]}" "${wanted[@]}" >&2; then
        return
    fi
    _twilight_say "uv could not install the packages; trying plain pip."
    "$python" -m pip install --disable-pip-version-check "${constrain[@]}" "${wanted[@]}" >&2
}

# Brings the environment up to date for the extras in $1 (none or "test") and sets TWILIGHT_VENV.
# Fails with a message when that is impossible.
twilight_setup() {
    local extras=${1:-} status=0
    TWILIGHT_VENV=$twilight_root/.venv${SGLANG_VERSION:+-$SGLANG_VERSION}
    mkdir -p "$TWILIGHT_VENV" || return
    exec 9<"$TWILIGHT_VENV" # two set-ups at a time would disturb each other
    if command -v flock >/dev/null; then flock 9; fi
    _twilight_update "$extras" 9<&- </dev/null || status=$?
    exec 9<&-
    return "$status"
}

_twilight_update() {
    local extras=$1 stamp=$TWILIGHT_VENV/twilight-stamp fingerprint
    if ! _twilight_python_fits "$TWILIGHT_VENV/bin/python"; then
        _twilight_make_venv || return
    fi
    fingerprint=$(_twilight_fingerprint "$extras") || return
    if grep -qsx "$fingerprint" "$stamp"; then return; fi
    rm -f "$stamp"
    _twilight_say "Installing SGLang and Twilight into $TWILIGHT_VENV; the first time this" \
        "downloads several GB and takes some minutes."
    if ! _twilight_install "$extras"; then
        _twilight_say "The packages could not be installed (see above). Check the network or pip's" \
            "index and proxy settings and the free disk space, then run this again."
        return 1
    fi
    # What is installed with extras also serves without them.
    { echo "$fingerprint" && _twilight_fingerprint ""; } >"$stamp"
    _twilight_say "Set-up done."
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    twilight_setup "$@"
fi
