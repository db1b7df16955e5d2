#!/bin/sh
# Print the path of a working Python 3.12, or one message and exit 2.
# A pyenv shim may exist without the version behind it, so each candidate is run, not only looked up.
for candidate in python3.12 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
        "$candidate" -c 'import sys; print(sys.executable)'
        exit 0
    fi
done
if command -v uv >/dev/null 2>&1 && uv python find 3.12 2>/dev/null; then
    exit 0
fi
cat >&2 <<'MESSAGE'
megatron_octo needs Python 3.12 (megatron-core does) and found none on the PATH.
  fix: install it (`pyenv install 3.12`, `uv python install 3.12`, or your system's python3.12), then run make again
MESSAGE
exit 2
