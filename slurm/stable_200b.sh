#!/bin/bash
# The stable stage: 50,000 steps of 512 x 8,192 tokens at a constant rate. It goes on until it is done.
#   sbatch slurm/stable_200b.sh                                       Llama-3.2-3B on 8 nodes of 8 GPUs
#   sbatch --nodes=32 slurm/stable_200b.sh --model llama31_8b@h200 --save.every-steps 500
#   sbatch --nodes=2 slurm/stable_200b.sh --recipe my_recipe.py:stable
#SBATCH --job-name=stable_200b
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
run_job stable_200b "$@"
