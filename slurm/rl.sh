#!/bin/bash
# R1-Zero on a branch: Ray's head and workers are the job's nodes, and ask for a token of this job's own.
#   sbatch slurm/rl.sh long
#   sbatch slurm/rl.sh long --model llama31_8b --num-steps 100
#   sbatch --nodes=2 slurm/rl.sh long --num-nodes 2
#SBATCH --job-name=rl
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
source "${OCTO_HOME:-$SLURM_SUBMIT_DIR}/slurm/lib/job.sh" || exit 2
run_job rl "$@"
