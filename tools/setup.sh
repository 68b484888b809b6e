# Sourced by the other scripts with the extra that they need, `views` or `dev`. Makes .venv if it does not exist, and
# installs the project with that extra into it. If MOE_BSR_PYTHON names an interpreter that has both, that one is used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="$1"
if [ -n "${MOE_BSR_PYTHON:-}" ]; then
    python="$MOE_BSR_PYTHON"
else
    python=.venv/bin/python
    stamp=".venv/installed-$extra"
    if [ ! -x "$python" ]; then
        base=""
        for candidate in python3.11 python3.12 python3.13 python3; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                base="$candidate"
                break
            fi
        done
        [ -n "$base" ] || { echo "Python 3.11 or newer is needed, and none was found" >&2; exit 1; }
        "$base" -m venv .venv
    fi
    # Reinstall only if the dependencies have changed, so that a second run starts at once.
    if ! cmp -s pyproject.toml "$stamp"; then
        echo "installing moe_bsr[$extra] and its dependencies into .venv (torch is large: one to three minutes) ..."
        "$python" -m pip install --quiet --disable-pip-version-check -e ".[$extra]" 2> >(grep -v '^WARNING: Location' >&2)
        cp pyproject.toml "$stamp"
    fi
fi
