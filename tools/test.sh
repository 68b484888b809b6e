#!/usr/bin/env bash
# Set up .venv if needed, then run the tests:  tools/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
exec "$python" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
