#!/bin/bash
# One page about finished runs, on one node: the arguments of `octo report`.
#   sbatch slurm/report.sh llama32-3b-stable-200b llama32-3b-decay-long llama32-3b-rl-long
#SBATCH --job-name=report
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
source "${OCTO_HOME:-$SLURM_SUBMIT_DIR}/slurm/lib/job.sh" || exit 2
run_job report "$@"
