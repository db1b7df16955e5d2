#!/bin/bash
# A whole pipeline as jobs that wait for each other: data, stable, decay branches, their exports and RL, scores, report.
# For a login node, or by sbatch. Run again, it submits what is not done. OPTIONS are sbatch's, for the training jobs.
#   slurm/pipeline.sh                                        recipes/road.py:llama32_3b
#   slurm/pipeline.sh --nodes=16 my_recipe.py:pipeline
#SBATCH --job-name=pipeline
#SBATCH --nodes=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm/logs/%x-%j.out
set -euo pipefail
here=$(dirname "$0")/..
[[ -f $here/slurm/lib/site.sh ]] || here=$SLURM_SUBMIT_DIR # this is the copy that Slurm made of it
cd "${OCTO_HOME:-$here}"
source slurm/lib/site.sh
need_slurm

options=()
while [[ ${1-} == -* ]]; do options+=("$1") && shift; done
if (($# > 1)); then
    echo "words after the recipe $1: ${*:2}
  fix: slurm/pipeline.sh [SBATCH OPTIONS, as --nodes=16] [RECIPE]; settings go into the recipe" >&2
    exit 2
fi
if ! has_octo; then
    echo "${OCTO[*]} does not run on this machine, and says which jobs a pipeline has
  fix: let OCTO_PYTHON, in the site file, name a Python here that has megatron_octo, as slurm/sites/pyxis.sh does on login
       nodes; or submit the stages one by one, with slurm/submit.sh" >&2
    exit 2
fi
tree=$("${OCTO[@]}" slurm tree -- "${options[@]}" "${1:-recipes/road.py:llama32_3b}")

declare -A id=()
trap '(($? == 0 || ${#id[@]} == 0)) || scancel "${id[@]}"' EXIT # all jobs, or none
while IFS=$'\t' read -r name after asked comment script args; do
    mapfile -t words < <(cpu_options "slurm/$script.sh")
    words+=(--parsable --job-name="${name// /-}" --comment="$comment" --kill-on-invalid-dep=yes)
    ids=''
    IFS=, read -ra names <<<"$after"
    for each in "${names[@]}"; do [[ $each == - ]] || ids+=":${id[$each]}"; done
    [[ $ids ]] && words+=(--dependency="afterok$ids")
    [[ $script == stable_200b || $script == decay_20b ]] && words+=("${options[@]}")
    IFS=' ' read -ra own <<<"$asked"
    [[ $asked == - ]] || words+=("${own[@]}")
    IFS=$'\t' read -ra arguments <<<"$args"
    job=$(sbatch_afresh "${words[@]}" "slurm/$script.sh" "${arguments[@]}")
    id[$name]=${job%%;*} # without the cluster's name
    echo "job ${id[$name]}  $name${ids:+  after ${ids#:}}"
done <<<"$tree"
