#!/bin/bash
# Answers sampled by vLLM and graded: the arguments of `octo evaluate`.
#   sbatch slurm/evaluate.sh runs/llama32-3b-decay-long/hf/step_00005000 --task math500 --problems math500.jsonl
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
source "${OCTO_HOME:-$SLURM_SUBMIT_DIR}/slurm/lib/job.sh" || exit 2
run_job evaluate "$@"
