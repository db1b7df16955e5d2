#!/bin/bash
# A conversion, on one node's CPUs: the arguments of `octo convert`.
#   sbatch slurm/convert.sh from-hf runs/hf/llama32-3b runs/base/llama32-3b
#   sbatch slurm/convert.sh to-hf runs/llama32-3b-decay-long
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
source "${OCTO_HOME:-$SLURM_SUBMIT_DIR}/slurm/lib/job.sh" || exit 2
run_job convert "$@"
