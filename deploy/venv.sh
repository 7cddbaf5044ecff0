# Sourced by ./deploy/up and ./deploy/test, with $root set: makes $root/.venv and installs a lock file into it, once.
# Needs Python 3.11+ and a package index; every package comes as a wheel, checked against its hash.

say() { printf '%s\n' "$*" >&2; }

find_python() {
    for candidate in "${HOTPATH_PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        [ -n "$candidate" ] || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        printf '%s\n' "$candidate"
        return
    done
    say "Hotpath needs Python 3.11 or newer, and found none on PATH. Install it, or name one: HOTPATH_PYTHON=/path/to/python3"
    exit 1
}

# ensure LOCK STAMP: nothing at all when $root/.venv already holds this lock (the stamp says so).
ensure() {
    lock=$1 stamp=$root/.venv/$2
    want="$(cksum <"$lock") $root"
    if [ -x "$root/.venv/bin/hotpath" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
        return
    fi
    # A virtual environment does not survive being moved: one made elsewhere, or left half made, is made anew.
    if ! [ "$(cat "$root/.venv/root" 2>/dev/null)" = "$root" ] || ! "$root/.venv/bin/python" -c '' 2>/dev/null; then
        python=$(find_python)
        say "making .venv with $("$python" --version) ..."
        if ! "$python" -m venv --clear "$root/.venv"; then
            say "Python's venv module is incomplete here (on Debian and Ubuntu: apt-get install python3-venv)."
            exit 1
        fi
        printf '%s\n' "$root" >"$root/.venv/root"
    fi
    say "installing $(basename "$lock") ..."
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
    (
        cd "$root"
        .venv/bin/python -m pip install --quiet --require-hashes --only-binary :all: -r "$lock"
        # The project itself: a path entry and the `hotpath` command, built by the setuptools just installed.
        .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --no-index \
            --config-settings editable_mode=compat -e .
    )
    printf '%s\n' "$want" >"$stamp"
}
