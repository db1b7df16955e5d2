#!/bin/bash
# sbatch, after the checks that need no allocation; with the site's account and partition. Same arguments as sbatch's:
#   slurm/submit.sh --nodes=8 slurm/decay_20b.sh long --model llama32_3b
set -euo pipefail
cd "$(dirname "$0")/.."
source slurm/lib/site.sh
need_slurm
run=''
if command -v "${OCTO[0]}" >/dev/null; then
    run=$("${OCTO[@]}" slurm check -- "$@")
else
    echo "${OCTO[0]} is not on this machine: the recipe is checked when the job starts" >&2
fi
exec sbatch ${run:+--comment="$run"} "$@" # `octo runs list` reads it while the job waits
