# shellcheck shell=bash
# What a job of slurm/*.sh does inside its allocation: `run_job NAME ARGUMENTS`, called after the directives.
#
#   records  what was run, where and from which code      $OCTO_RUNS/slurm/JOB.RESTART/
#   plan     the `octo` command, checked against the allocation before anything runs
#   preflight  a check of each node; a bad one is left out and the job requeued
#   ranks    one a GPU for training, one a node for RL on several, else one task; they meet at the first node
#   end      done, stopped, failed, or requeued: never again for bad input or what RL's watch stopped, nor after
#            OCTO_TRIES starts without a save (MOST_LIMITS time limits, where nothing is saved by step);
#            where Slurm may not requeue, as a new job
#
# Exit codes are looked at one by one: `set -e` does not go with traps and `wait`.
set -uo pipefail

RESTART=${SLURM_RESTART_COUNT:-0}
GPUS=${SLURM_GPUS_PER_NODE-0} GPUS=${GPUS##*:} # `--exclusive` grants all that a node has, but this many were asked for
RUN=''
CHAIN="${OCTO_CHAIN-} $SLURM_JOB_ID" # this job, after those that it goes on from
STEP=''                              # the process of srun, once the ranks are started
TOLD='told to end; if Slurm took the nodes away it queues the job again'
ASKED='asked to end, and its last save is of step'
TIME='give the job more time (sbatch --time), well above the notice of its signal (--signal)'
SIGNAL=''      # the last one that asked this job to end
PASSED_ON=TERM # what its tasks are told then
UNBOUND=(--cpu-bind=none) # a node's only task has all cores of it; a site's default may be one core a task
MOST_CLOCK_S=30 # that a node may be off the first one
MOST_LIMITS=20  # time limits that what saves nothing by step may come to
ASKS=60         # that Slurm's controller gets to answer: it may be restarting, or failing over
ASK_AGAIN_S=10
BAD_INPUT=2
STOPPED_BY_WATCH=3 # a person is to decide how the run goes on

say() { echo "[$(date +%FT%T)] job $SLURM_JOB_ID.$RESTART: $*" >&2; }

finish() { # STATE EXIT_CODE REASON...
    say "$1: ${*:3}"
    echo "$1 ${*:3}" >"$LOGS/state"
    exit "$2"
}

run_job() { # NAME [ARGUMENTS]
    cd "${OCTO_HOME:-$SLURM_SUBMIT_DIR}" || exit 2
    source slurm/lib/site.sh
    ARGUMENTS=("${@:2}")
    export SLURM_EXPORT_ENV=ALL # tasks get what is set here, whatever sbatch --export says
    trap 'asked USR1' USR1
    trap 'asked TERM' TERM
    keep_records
    make_plan "$@"
    [[ $RUN && -e $RUN/DONE ]] && finish "done" 0 "$RUN was done already"
    [[ $RUN && -e $RUN/STOP ]] && rm -f "$RUN/STOP" && finish stopped 0 "$RUN had a STOP file"
    check_nodes
    run_ranks
    end_job
}

asked() { # SIGNAL
    SIGNAL=$1
    is_current 1 || return 0
    say "SIG$1: the tasks are asked to save and to end"
    # steps only, not this script; srun passes it on, too, without Slurm's controller
    scancel --signal="$PASSED_ON" "$SLURM_JOB_ID" 2>/dev/null || { [[ $STEP ]] && kill -s "$PASSED_ON" "$STEP"; }
}

# False for a script that outlived its start, on a node that Slurm had lost, say: it must touch no other. Where Slurm does
# not answer there can be no other either.
is_current() { # [ASKS]
    local restarts
    restarts=$(field Restarts "$@")
    [[ ${restarts:-$RESTART} == "$RESTART" ]]
}

field() { # NAME [ASKS]: of this job, as Slurm has it; empty where it does not answer
    local shown asks=${2:-$ASKS}
    until shown=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null); do
        ((--asks > 0)) || return 0
        sleep "$ASK_AGAIN_S"
    done
    sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" <<<"$shown"
}

is_first_start() { # what is wrong in a later one is more likely a disk's fault, or a node's, and may pass
    ((RESTART == 0)) && [[ ! ${OCTO_CHAIN-} ]]
}

is_bad_input() { # CODE
    (($1 == BAD_INPUT)) && is_first_start
}

give_way() { # to a signal that came before the ranks had started
    [[ $SIGNAL == TERM ]] && finish stopped 0 "$TOLD"
    [[ $SIGNAL == USR1 ]] && go_on 1 "asked to end before the ranks had started" "$TIME"
    return 0
}

keep_records() {
    if [[ ${SLURM_ARRAY_JOB_ID-} && $(field ArrayJobId 1) ]]; then # not that of a job in which this one was submitted
        echo "an array's tasks would all be the same run
  fix: submit without --array; a job queues itself again until its run is done" >&2
        exit "$BAD_INPUT"
    fi
    LOGS=$OCTO_RUNS/slurm/$SLURM_JOB_ID.$RESTART
    if ! mkdir -p "$LOGS" || ! echo running >"$LOGS/state"; then
        echo "log folder $LOGS cannot be written
  fix: let OCTO_RUNS, in the site file, name a folder with room that is yours to write" >&2
        exit "$BAD_INPUT"
    fi
    mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    printf '%s\n' "${HOSTS[@]}" >"$LOGS/hosts"
    scontrol show job "$SLURM_JOB_ID" >"$LOGS/job.txt"
    cp "$0" "$LOGS/batch.sh"
    { git rev-parse HEAD && git status --short; } >"$LOGS/code.txt" 2>/dev/null
    git diff HEAD >"$LOGS/code.diff" 2>/dev/null
    compgen -e >"$LOGS/environment.txt" # names only: values may be secrets
}

one_task() { # COMMAND...
    "${SRUN[@]}" --nodes=1 --ntasks=1 "${UNBOUND[@]}" "$@"
}

make_plan() { # NAME [ARGUMENTS]
    local code
    one_task "${OCTO[@]}" slurm plan --nodes "$SLURM_JOB_NUM_NODES" --gpus-per-node "$GPUS" \
        --records "$LOGS" "$@" 2>&1 | tee "$LOGS/plan.log" >&2
    code=${PIPESTATUS[0]}
    RUN=$(cat "$LOGS/run" 2>/dev/null)
    [[ $RUN ]] && scontrol update "JobId=$SLURM_JOB_ID" "Comment=$RUN" 2>/dev/null # by which others know whose job it is
    give_way
    ((code == 0)) || is_bad_input "$code" || check_nodes # it may be this node's fault
    ((code == 0)) || go_on "$code" "$(reason "$LOGS/plan.log")"
    mapfile -t ARGV <"$LOGS/argv"
}

check_nodes() {
    local bad before said unreached none
    before=$(date +%s)
    "${SRUN[@]}" --ntasks="${#HOSTS[@]}" --ntasks-per-node=1 "${UNBOUND[@]}" --kill-on-bad-exit=0 --time=20 \
        --output="$LOGS/preflight.txt" "${OCTO[@]}" slurm preflight --gpus "$GPUS" \
        --command "$OCTO_PREFLIGHT" 2>"$LOGS/preflight_srun.txt"
    cat "$LOGS/preflight_srun.txt" >&2
    give_way
    said=$(judge_clocks "$before" "$(date +%s)" <"$LOGS/preflight.txt")
    if (($(awk '$2 == "ok" { print $4 }' "$LOGS/preflight.txt" | sort -u | wc -l) > 1)); then
        say "the nodes' drivers differ: $(awk '$2 == "ok" { print $1 " " $4 }' "$LOGS/preflight.txt" | paste -sd,)"
    fi
    unreached=$(sed -En 's/.* failed on node ([^: ]+).*/\1 bad: it could not be reached/p' "$LOGS/preflight_srun.txt" | sort -u)
    if [[ $unreached ]]; then # srun ended the other nodes' tasks because of it
        said=$(echo "$said"; echo "$unreached")
        bad=$(sed -n 's/ bad: .*//p' <<<"$said" | sort -u | paste -sd,)
    else # a node that said nothing is bad too
        bad=$(comm -23 <(sort "$LOGS/hosts") <(sed -n 's/ ok .*//p' <<<"$said" | sort) | paste -sd,)
    fi
    [[ $bad ]] || return 0
    [[ $said ]] || go_on 1 "no node said how it is: $(reason "$LOGS/preflight_srun.txt")"
    if [[ $bad == "$(sort "$LOGS/hosts" | paste -sd,)" ]]; then
        none="no node passed the preflight: $(grep -m1 ' bad: ' <<<"$said")"
        is_first_start || go_on 1 "$none"
        finish failed 1 "$none"
    fi
    say "$(grep ' bad: ' <<<"$said")"
    requeue "without $bad, which failed the preflight" "$bad"
}

judge_clocks() { # BEFORE AFTER: each node said its time, which is between this one's, however long it took to start
    awk -v before="$1" -v after="$2" -v most="$MOST_CLOCK_S" -v first="${HOSTS[0]}" '
        { line[NR] = $0; node[NR] = $1 }
        $2 == "ok" {
            good += 1
            off = $3 < before ? $3 - before : $3 > after ? $3 - after : 0
            if (off * off > most * most) { wrong[NR] = off; bad += 1; last = off }
        }
        END {
            for (n = 1; n <= NR; n++)
                if (2 * bad <= good && n in wrong) # else it is the first one that is off
                    print node[n] " bad: its clock is " wrong[n] " s off that of the first node"
                else if (2 * bad > good && node[n] == first)
                    print first " bad: its clock is " (0 - last) " s off that of most others"
                else print line[n]
        }'
}

run_ranks() {
    local tasks=(--nodes=1 --ntasks=1 "${UNBOUND[@]}") part=() end
    MASTER_ADDR=${HOSTS[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 12768)) # below those that Linux gives out
    export MASTER_ADDR MASTER_PORT
    end=$(field EndTime 1) # newer Slurms set it themselves; there may be none
    [[ $end ]] && end=$(date -d "$end" +%s 2>/dev/null) && export SLURM_JOB_END_TIME=$end
    if [[ ${ARGV[0]} == rl ]] && ((${#HOSTS[@]} > 1)); then # one Ray of all nodes
        tasks=(--ntasks="${#HOSTS[@]}" --ntasks-per-node=1 "${UNBOUND[@]}")
        part=(slurm node --gpus "$GPUS" --token "$LOGS/ray_token" --peer "${HOSTS[1]}" --)
        trap 'rm -f "$LOGS/ray_token"' EXIT
    elif [[ ${ARGV[0]} == train ]]; then
        PASSED_ON=USR1 # of TERM srun would make an end in 30 s
        tasks=(--ntasks=$((${#HOSTS[@]} * GPUS)) --ntasks-per-node="$GPUS")
        tasks+=(--cpus-per-task=$((SLURM_CPUS_ON_NODE / GPUS)))
    fi
    give_way
    say "octo ${ARGV[*]} on ${#HOSTS[@]} nodes, from ${HOSTS[0]} on; output in $LOGS/ranks.txt"
    # --wait=0: a rank may go on for as long as it likes after the others, whatever the site's default: it may be writing
    "${SRUN[@]}" "${tasks[@]}" --wait=0 --kill-on-bad-exit=1 --label --output="$LOGS/ranks.txt" \
        "${OCTO[@]}" "${part[@]}" "${ARGV[@]}" 2>"$LOGS/srun.txt" &
    STEP=$!
    while kill -0 "$STEP" 2>/dev/null; do wait "$STEP"; done # a trap ends `wait` early
    wait "$STEP"
    CODE=$?
    cat "$LOGS/srun.txt" >&2
    # srun's own code is the highest: that of ranks that were ended because of the first
    FIRST=$(grep -m1 -E '^srun: error: .*\btasks? ' "$LOGS/srun.txt")
    ((CODE == 0)) || CODE=$(grep -oP 'Exited with exit code \K\d+' <<<"$FIRST" || echo "$CODE")
}

end_job() {
    if ((CODE == 0)) && [[ ! $RUN || -e $RUN/DONE ]]; then
        finish "done" 0 "${RUN:-octo ${ARGV[*]}}"
    fi
    [[ $SIGNAL == TERM ]] && finish stopped "$CODE" "$TOLD"
    if ((CODE == 0)); then
        grep -q "found .*/STOP:" "$LOGS/ranks.txt" && finish stopped 0 "by a STOP file; the same command goes on"
        go_on 1 "$ASKED $(last_save)" "$TIME" # a preemption signals the ranks alone
    fi
    if [[ $SIGNAL == USR1 && ${ARGV[0]} == rl ]]; then # it saves when it is due, not when it is asked to end
        go_on "$CODE" "$ASKED $(last_save)" "let it save more often (--save-every-steps), or $TIME"
    fi
    [[ $SIGNAL == USR1 && ! $RUN ]] && go_on "$CODE" "its time limit was near" "$TIME"
    if [[ $FIRST && $FIRST != *'Exited with exit code'* ]]; then # killed, or out of memory: it could not say why
        go_on "$CODE" "${FIRST#srun: error: }"
    fi
    go_on "$CODE" "exit code $CODE: $(reason "$LOGS/ranks.txt" "$LOGS/srun.txt")"
}

go_on() { # EXIT_CODE REASON [FIX]: queue the job again, unless too many starts got it no further
    local most=${OCTO_TRIES:-3} at job
    { is_bad_input "$1" || (($1 == STOPPED_BY_WATCH)); } && finish failed "$1" "$2"
    at=$(last_save)
    [[ $SIGNAL == USR1 && ! $RUN ]] && at=limit most=$MOST_LIMITS
    echo "$at" >"$LOGS/ended_at"
    if (($(for job in $CHAIN; do cat "$OCTO_RUNS/slurm/$job".*/ended_at 2>/dev/null; done |
        grep -cx "$at") >= most)); then
        finish failed "$1" "$most starts ended without a save in between; $2${3:+
  fix: $3}"
    fi
    requeue "$2"
}

last_save() { # the step of the run's last save, 0 without one
    local steps
    [[ $RUN ]] && steps=$(find "$RUN/checkpoints" "$RUN/openrlhf" -maxdepth 2 -name '*step*' 2>/dev/null |
        sed -En 's/^.*\/(step_|global_step)0*([0-9]+)$/\2/p' | sort -n | tail -1)
    echo "${steps:-0}"
}

reason() { # LOG...: what failed, by the first line that says so
    grep -hoE 'octo [a-z]+: .*|[A-Za-z.]*Error: .*|srun: error: .*' "$@" | head -n 1 | grep . || echo "see $1"
}

requeue() { # REASON [NODES]: start again, without these nodes
    local left_out next
    left_out=$(field ExcNodeList | grep -v '(null)')
    left_out+=${2:+${left_out:+,}$2}
    trap '' TERM # Slurm's, for this very requeue
    is_current || finish stopped 0 "$TOLD"
    if [[ $OCTO_REQUEUE == resubmit || $(field Requeue) == 0 ]]; then
        next=$(resubmit "$left_out") || finish failed 1 "no job could be submitted to go on ($1)
  fix: submit the same command again${left_out:+, with sbatch --exclude=$left_out}; it goes on from the last save"
        finish resubmitted 0 "as job $next: $1"
    fi
    if [[ ${2-} && $(sbatch_alike "$left_out" --test-only 2>&1) == *'node configuration is not available'* ]]; then
        finish failed 1 "$1, and no other node can take its place: queued again it would wait for ever
  fix: have $left_out mended, or submit the same command on fewer nodes (sbatch --nodes); it goes on from the last save"
    fi
    scontrol requeue "$SLURM_JOB_ID" || finish failed 1 "cannot be requeued here ($1)
  fix: submit the same command again${2:+, with sbatch --exclude=$left_out}, and set OCTO_REQUEUE=resubmit in the site file
       if this cluster never requeues; it goes on from the last save"
    # pending from now on, so its nodes can be changed
    [[ ${2-} ]] && scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$left_out"
    finish requeued 0 "$1"
}

sbatch_alike() { # NODES_LEFT_OUT [OPTIONS]: sbatch of the same job once more
    local own
    mapfile -t own < <(cpu_options "$0")
    [[ $(field Requeue) == 0 ]] && own+=(--no-requeue)
    OCTO_CHAIN=$CHAIN sbatch_afresh "${own[@]}" "${@:2}" \
        --job-name="$SLURM_JOB_NAME" --partition="$SLURM_JOB_PARTITION" --nodes="$SLURM_JOB_NUM_NODES" \
        --time="$(field TimeLimit)" ${SLURM_GPUS_PER_NODE:+--gpus-per-node="$SLURM_GPUS_PER_NODE"} \
        ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} \
        ${SLURM_JOB_RESERVATION:+--reservation="$SLURM_JOB_RESERVATION"} \
        ${1:+--exclude="$1"} --comment="${RUN:-$OCTO_RUNS/slurm}" "$0" "${ARGUMENTS[@]}"
}

resubmit() { # NODES_LEFT_OUT: the same job, after this one; what waits for this one waits for it. Prints its id.
    local next job after
    next=$(sbatch_alike "$1" --parsable --dependency="afterany:$SLURM_JOB_ID") || return
    squeue --noheader --me --states=PENDING --format='%A %E' | grep "afterok:$SLURM_JOB_ID\b" |
        while read -r job after; do
            after=$(sed -E "s/\([a-z]+\)//g; s/afterok:$SLURM_JOB_ID\b/afterok:${next%;*}/" <<<"$after")
            scontrol update "JobId=$job" "Dependency=$after" >&2
        done
    echo "${next%;*}" # without the cluster's name
}
