#!/bin/bash
# sbatch, after the checks that need no allocation; with the site's account and partition. Same arguments as sbatch's:
#   slurm/submit.sh --nodes=8 slurm/decay_20b.sh long --model llama32_3b
# slurm/pipeline.sh, which checks and submits by itself, runs here.
set -euo pipefail
cd "$(dirname "$0")/.."
source slurm/lib/site.sh
need_slurm
for ((n = 1; n <= $#; n++)); do
    [[ ${!n} == *.sh ]] || continue
    [[ ${!n} == *pipeline.sh ]] && exec slurm/pipeline.sh "${@:1:n-1}" "${@:n+1}"
    mapfile -t own < <(cpu_options "${!n}")
    set -- "${own[@]}" "$@"
    break
done
run=''
if has_octo; then
    run=$("${OCTO[@]}" slurm check -- "$@")
else
    echo "${OCTO[*]} does not run on this machine: the recipe is checked when the job starts" >&2
    check_logs
fi
sbatch_afresh ${run:+--comment="$run"} "$@" # by which `octo runs list` knows a job that waits
