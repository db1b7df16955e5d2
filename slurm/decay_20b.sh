#!/bin/bash
# A decay branch of the stable stage: short, long or hybrid; 5,000 steps.
#   sbatch slurm/decay_20b.sh long
#   sbatch --nodes=8 slurm/decay_20b.sh long --model llama32_3b --start.tokens 100000595968
#SBATCH --job-name=decay_20b
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
source "${OCTO_HOME:-$SLURM_SUBMIT_DIR}/slurm/lib/job.sh" || exit 2
run_job decay_20b "$@"
