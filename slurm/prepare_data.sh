#!/bin/bash
# Text to indexed data sets, on one node's CPUs: the arguments of `octo data`.
#   sbatch slurm/prepare_data.sh prepare recipes/corpora.py:megamath_web_pro --workers 64
#SBATCH --job-name=prepare_data
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
source "${OCTO_HOME:-$SLURM_SUBMIT_DIR}/slurm/lib/job.sh" || exit 2
run_job prepare_data "$@"
