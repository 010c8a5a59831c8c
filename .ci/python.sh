#!/usr/bin/env bash
# Make sure that a working virtual environment stands in the folder given: uses $PYTHON, else the first Python >= 3.11.
set -euo pipefail

folder=$1
wanted='import sys; sys.exit(sys.version_info < (3, 11))'

# An environment whose creation was interrupted has a python but no pip.
if "$folder/bin/python" -m pip --version >/dev/null 2>&1 && "$folder/bin/python" -c "$wanted"; then
    exit 0
fi
for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13 python}; do
    if "$candidate" -c "$wanted" >/dev/null 2>&1; then
        echo "== creating $folder with $("$candidate" --version)" >&2
        exec "$candidate" -m venv --clear "$folder"
    fi
done
echo "no Python 3.11 or newer found (tried: ${PYTHON:-python3.11 python3 python3.12 python3.13 python});" \
    "install one, or name it: make ${MAKECMDGOALS:-test} PYTHON=/path/to/python" >&2
exit 2
