# shellcheck shell=bash disable=SC2034 # those that source it use what it sets
# The site's file, and what it leaves open. Sourced, in the repository's folder, on login nodes and in jobs.
#   OCTO      the command line of `octo`, as an array
#   SRUN      `srun` with the site's options, as an array

OCTO_SITE=${OCTO_SITE:-slurm/site.sh}
if [[ ! -f $OCTO_SITE ]]; then
    echo "no site file $OCTO_SITE
  fix: copy one of slurm/sites/ (venv.sh, apptainer.sh, pyxis.sh) to slurm/site.sh and fill it in;
       OCTO_SITE names another file" >&2
    exit 2
fi
OCTO_PYTHON=python3 OCTO_EXEC=() OCTO_SRUN=() OCTO_CPU_SBATCH=() OCTO_PREFLIGHT='' OCTO_REQUEUE=''
LEAST_FREE_KIB=1048576 # for what Slurm and the ranks print
# shellcheck source=slurm/sites/venv.sh
source "$OCTO_SITE"
export OCTO_RUNS=${OCTO_RUNS:-$PWD/runs}
OCTO=("${OCTO_EXEC[@]}" "$OCTO_PYTHON" -m megatron_octo)
SRUN=(srun "${OCTO_SRUN[@]}")

has_octo() { # whether `octo` runs on this machine: a container's may be on nodes alone
    "${OCTO[@]}" --version >/dev/null 2>&1
}

check_logs() { # what `octo slurm check` says of folders, where there is no octo
    local there=$OCTO_RUNS output=${SBATCH_OUTPUT:-slurm/logs/%x-%j.out} folder free
    until [[ -e $there ]]; do there=$(dirname "$there"); done
    local folders=("$there")
    if [[ ! -c $output ]]; then # Slurm makes no folder for it, and fills in words as %j
        folder=$(dirname "$output")
        while [[ $folder == *%* ]]; do folder=$(dirname "$folder"); done
        folders+=("$folder")
    fi
    for folder in "${folders[@]}"; do
        if [[ ! -d $folder || ! -w $folder ]]; then
            [[ $folder == "$there" ]] && folder=$OCTO_RUNS
            echo "log folder $folder cannot be written
  fix: make it, or its parent, yours to write; OCTO_RUNS names another root for runs" >&2
            exit 2
        fi
        free=$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')
        ((free < LEAST_FREE_KIB)) || continue
        echo "log folder $folder: $free KiB are left on its disk
  fix: free at least 1 GiB there, or let OCTO_RUNS name another disk" >&2
        exit 2
    done
}

sbatch_afresh() ( # [OPTIONS] SCRIPT [ARGUMENTS]: sbatch, whose job must not take an allocation's SLURM_* for its own
    if [[ ${SLURM_JOB_ID-} ]]; then
        for name in "${!SLURM_@}"; do
            [[ $name =~ ^SLURM_(CONF|JWT|CLUSTERS)$ ]] || unset "$name"
        done
    fi
    exec sbatch "$@"
)

cpu_options() { # SCRIPT: the site's, a line each, for a job that asks for no GPU
    [[ ! -f $1 ]] || grep -q '^#SBATCH --gpus' "$1" || ((${#OCTO_CPU_SBATCH[@]} == 0)) ||
        printf '%s\n' "${OCTO_CPU_SBATCH[@]}"
}

need_slurm() {
    command -v sbatch >/dev/null && return
    echo "no Slurm here: sbatch is not on PATH
  fix: run this on a login node of the cluster; without Slurm, \`octo train RECIPE --ranks N\` runs on one machine" >&2
    exit 2
}
