"""Stands for the interpreter in a job whose work is not the matter: tasks only say where they are.

Plans and preflights are the product's, but for the inputs, which need not be there. STUB_EXIT is the tasks' exit code,
or, with commas, that of each start; STUB_PLAN_S how long a plan takes; STUB_SLOW names a node whose preflight takes 3 s
to start, STUB_LATE one whose clock is an hour late: "first" is the first start's first. With STUB_WAITS tasks wait to
be told to end: by SIGTERM, which ends them as it does `octo`, or, as a training that has nothing to save, by SIGUSR1.
Run by `python -S`: of hundreds of ranks one needs a package.
"""

from __future__ import annotations

import json
import os
import signal
import site
import sys
import time

_, _, _, *argv = sys.argv  # stub.py -m megatron_octo ARGV
if argv == ["--version"]:  # does octo run here?
    sys.exit()
if argv[0] == "slurm":
    site.main()
    from megatron_octo.cli import app, slurm

    slurm._check_inputs = lambda *_: time.sleep(float(os.environ.get("STUB_PLAN_S", "0")))
    node, clock = os.environ.get("SLURMD_NODENAME"), time.time
    if argv[1] == "preflight" and node == os.environ.get("STUB_SLOW"):
        time.sleep(3)
    is_first = os.environ.get("SLURM_PROCID") == "0" and "SLURM_RESTART_COUNT" not in os.environ
    if argv[1] == "preflight" and os.environ.get("STUB_LATE") in (node, "first" if is_first else ""):
        time.time = lambda: clock() - 3600
    sys.exit(app.main(argv))

names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURMD_NODENAME", "MASTER_ADDR", "MASTER_PORT")
names += ("CUDA_VISIBLE_DEVICES", "SLURM_CPU_BIND_TYPE", "SLURM_JOB_END_TIME")
if "STUB_WAITS" in os.environ:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
print(json.dumps([argv, *map(os.environ.get, names)]), flush=True)
if "STUB_WAITS" in os.environ:
    signal.pause()
codes = os.environ.get("STUB_EXIT", "0").split(",")
code = int(codes[min(int(os.environ.get("SLURM_RESTART_COUNT", "0")), len(codes) - 1)])
if code == 0 and os.environ["SLURM_PROCID"] == "0":
    site.main()
    from megatron_octo import rundir
    from megatron_octo.launch.slurm import job

    script = {"train": "stable_200b", "rl": "rl"}.get(argv[0])
    if script:
        run = job(script, ["--recipe", *argv[1:]]).run
        assert run
        rundir.mark_done(run)
sys.exit(code)
