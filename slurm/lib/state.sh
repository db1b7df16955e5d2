#!/bin/bash
# A job as Slurm has it, and what the job itself said last: `slurm/lib/state.sh JOB` prints STATE WORDS...
# `octo launch --wait` asks it, here or by ssh.
cd "$(dirname "$0")/../.." || exit 2
source slurm/lib/site.sh
state=$(squeue --noheader --states=all --jobs="$1" --format=%T)
# minutes after its end Slurm forgets a job, but for its accounts, where there are any
[[ $state ]] || state=$(sacct --noheader --allocations --parsable2 --jobs="$1" --format=State)
start=$(printf '%s\n' "$OCTO_RUNS/slurm/$1".* | sort -V | tail -1)
echo "${state%% *} $(cat "$start/state" 2>/dev/null)" # sacct's "CANCELLED by 0" is one word too
