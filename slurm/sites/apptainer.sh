# shellcheck shell=bash disable=SC2034 # the scripts that source it use what it sets
# A site that runs containers by apptainer (or singularity). Not run by the tests, which have neither.
# Copy it to slurm/site.sh and fill it in. No secrets here: HF_TOKEN and WANDB_API_KEY come from your own environment.

# sbatch reads these itself, where this file is sourced before: slurm/submit.sh and slurm/pipeline.sh do.
export SBATCH_ACCOUNT=my-account
export SBATCH_PARTITION=gpu

export OCTO_RUNS=/shared/$USER/runs        # all runs and logs; on a disk that all nodes see
OCTO_EXEC=(apptainer exec --nv --bind "/shared,$PWD" --pwd "$PWD" /shared/images/octo.sif)
OCTO_PYTHON=python3                        # in the image
# On login nodes without apptainer:
# [[ ${SLURM_JOB_ID-} ]] || OCTO_EXEC=() OCTO_PYTHON=/shared/$USER/octo/.venv/bin/python

export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5 # the fabric; `ibstat` and `ip link` name yours
export NCCL_DEBUG=WARN TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# which collectives each rank has begun, when one hangs: a file a rank
export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$OCTO_RUNS/slurm/nccl-${SLURM_JOB_ID-}-
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=8

# A check of your own on each node: it must exit with 0. This one runs nccl-tests on a node's GPUs, at least 300 GB/s:
# OCTO_PREFLIGHT='all_reduce_perf -b 4G -e 4G -g 8 | awk "/Avg bus bandwidth/ {b = \$NF} END {print b+0, \"GB/s\"; exit b < 300}"'
# OCTO_REQUEUE=resubmit                      # where a job may not requeue itself, a new one goes on
# OCTO_CPU_SBATCH=(--partition=cpu)          # for jobs that ask for no GPU: data, conversion, report
