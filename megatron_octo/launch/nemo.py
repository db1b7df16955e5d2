"""A stage through NeMo-Run: as processes here, as the Slurm job that slurm/lib/job.sh makes of it, or on Kubernetes,
where Kubeflow's trainer or SkyPilot starts it.

The only importer of nemo_run, which is an extra. What NeMo-Run writes around the job (its own srun, its retries) is
never reached: `run_job` ends the script itself, so that saving, requeueing and preflights exist once. On Kubernetes
there is no such script: a TrainJob, or SkyPilot's task, starts torchrun on each node.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_octo.config.rl import RLConfig
from megatron_octo.console import logger
from megatron_octo.errors import BadInput, OctoError
from megatron_octo.launch.slurm import SITE, Job, Shape

SIGNAL = "B:USR1@900"
STATE = Path("slurm/lib/state.sh")
POLL_S = 5.0
SILENCE_S = 600.0
"""For so long Slurm, or the way to it, may fail to answer before a job is given up."""
ENDED = ("BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
"""What Slurm calls a job that has ended and will not start again, but for one that ended well."""
GOES_ON = "resubmitted as job "
SKYPILOT_MEETING = (
    "--nnodes=$num_nodes",
    "--node-rank=$SKYPILOT_NODE_RANK",
    "--nproc-per-node=$SKYPILOT_NUM_GPUS_PER_NODE",
    "--master-addr=$head_node_ip",
    "--master-port=29500",
)
"""How torchrun meets on a cluster of SkyPilot's; NeMo-Run sets the variables that are not SkyPilot's."""
IDLE_MINUTES = 10
"""After these without a job SkyPilot gives the nodes back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where to launch."""

    on: Literal["slurm", "local", "kubernetes", "skypilot"]
    shape: Shape
    time: str = "24:00:00"
    account: str = ""
    partition: str | None = None
    host: str = ""
    """A login node to reach by ssh; empty submits from here."""
    user: str = ""
    """Whose account that is there."""
    checkout: Path
    """The repository's folder, on that side."""
    image: str = ""
    """On Kubernetes: the container image. Its working directory is the repository's folder, but for SkyPilot."""
    gpu: str = ""
    """For SkyPilot: which GPU, by its name for it."""
    namespace: str = "default"
    """For Kubeflow."""
    volume: str = ""
    """On Kubernetes: CLAIM:PATH, the persistent volume claim that runs are written to, and where ranks see it."""

    @property
    def follows(self) -> bool:
        """Whether NeMo-Run itself follows the job to its end."""
        return self.on in ("local", "kubernetes")


def sbatch_text(job: Job, target: Target) -> str:
    """The script that would be submitted. Nothing is left on disk."""
    with tempfile.TemporaryDirectory() as home, _home(home) as real:
        with _experiment(job, target) as experiment:
            experiment.dryrun(log=False, delete_exp_dir=False)
        (script,) = Path(home).rglob("*_sbatch.sh")
        return script.read_text().replace(home, real)


def manifest(job: Job, target: Target) -> str:
    """The TrainJob that would be created, or SkyPilot's task, as JSON. Nothing is left on disk."""
    with tempfile.TemporaryDirectory() as home, _home(home) as real, _experiment(job, target) as experiment:
        experiment.dryrun(log=False)
        request = experiment.jobs[0]._dryrun_info.request
        if target.on == "skypilot":
            return json.dumps(request.task.to_yaml_config(), indent=2).replace(home, real)
        return json.dumps(request.executor.get_job_body(_name(job), request.cmd), indent=2)


def launch(job: Job, target: Target, *, wait: bool) -> str:
    """Start the job; returns what to call it. Follow it to its end if NeMo-Run does, or with `wait`, on Slurm.

    Raises:
        BadInput: there is no site file on the other side.
        OctoError: it failed. NeMo-Run itself would exit with 0.
    """
    with _experiment(job, target) as experiment:
        if target.host:
            _check_there(experiment.jobs[0].executor.tunnel, target)
        if target.on == "local":  # its session is its own: it would outlive this process
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, lambda *_: experiment.cancel(_name(job)))
        experiment.run(detach=not target.follows, tail_logs=target.follows)
    if target.follows:
        states = {name: str(each["status"]) for name, each in experiment.status(return_dict=True).items()}
        if failed := {name: state for name, state in states.items() if "SUCCEEDED" not in state}:
            raise OctoError(f"not all jobs succeeded: {failed}", fix="the output above says why")
        return ", ".join(states)
    name = experiment.jobs[0].handle.rpartition("/")[2]
    if target.on == "skypilot":
        _, cluster, _, number = name.split("___")
        return f"job {number} of cluster {cluster}: sky logs {cluster} {number}"
    if wait:
        return _follow(name, experiment.jobs[0].executor.tunnel, target.checkout)
    return f"job {name}"


@contextlib.contextmanager
def _experiment(job: Job, target: Target) -> Iterator[Any]:
    """NeMo-Run's experiment, with the job as its one task. What it prints goes to stderr."""
    import nemo_run

    if target.on == "slurm":
        task, executor = nemo_run.Script(inline=":"), _slurm(job, target)  # the script is never reached
    elif target.on == "kubernetes":
        task, executor = _torchrun("-m", "megatron_octo", *job.argv), _kubernetes(target)
    elif target.on == "skypilot":
        words = map(shlex.quote, job.argv)  # its shell reads them
        task, executor = _torchrun(*SKYPILOT_MEETING, "-m", "megatron_octo", *words), _skypilot(target)
    else:
        ranks = ["--ranks", str(target.shape.ranks)] if job.argv[0] == "train" else []
        command = shlex.join([sys.executable, "-m", "megatron_octo", *job.argv, *ranks])
        task, executor = nemo_run.Script(inline=command), nemo_run.LocalExecutor()
    with contextlib.redirect_stdout(sys.stderr), nemo_run.Experiment(_name(job)) as experiment:
        experiment.add(task, executor=executor, name=_name(job))
        yield experiment


def _torchrun(*args: str) -> Any:
    """Ranks of a node."""
    import nemo_run

    return nemo_run.Script(path="megatron_octo.launch.ranks", m=True, entrypoint="python", args=list(args))


def _slurm(job: Job, target: Target) -> Any:
    import nemo_run
    from nemo_run.config import get_nemorun_home

    tunnel = nemo_run.LocalTunnel(job_dir=f"{get_nemorun_home()}/experiments")  # it copies nothing to another one
    if target.host:
        tunnel = nemo_run.SSHTunnel(host=target.host, user=target.user, job_dir=str(target.checkout / "slurm" / "logs"))
    return nemo_run.SlurmExecutor(
        account=target.account,
        partition=target.partition,
        time=target.time,
        nodes=target.shape.nodes,
        ntasks_per_node=1,  # of the script that NeMo-Run starts; ours starts a rank a GPU
        gpus_per_node=target.shape.gpus_per_node,
        exclusive=True,
        mem="0",
        signal=SIGNAL,
        additional_parameters={"requeue": True},
        comment=None if target.host or not job.run else str(target.checkout / job.run),  # for `octo runs list` here
        setup_lines=_payload(job, target),
        tunnel=tunnel,
        packager=nemo_run.Packager(),
    )


def _kubernetes(target: Target) -> Any:
    """A TrainJob; the trainer tells torchrun nodes, ranks and where they meet by PET_*, its own variables.

    Raises:
        OctoError: the Kubernetes client is missing, or knows no cluster.
    """
    from nemo_run.core.execution.kubeflow import KubeflowExecutor

    try:
        from kubernetes.config import ConfigException
    except ImportError as error:
        raise OctoError(
            f"the Kubernetes client cannot be imported: {error}", fix="pip install 'nemo-run[kubeflow]==0.11.1'"
        ) from error
    claim, _, path = target.volume.partition(":")
    volumes = {
        "runs": (path, {"persistentVolumeClaim": {"claimName": claim}}),
        "shm": ("/dev/shm", {"emptyDir": {"medium": "Memory"}}),  # NCCL's and the data loader's; 64 MiB by default
    }
    try:
        return KubeflowExecutor(
            image=target.image,
            namespace=target.namespace,
            num_nodes=target.shape.nodes,
            gpus_per_node=target.shape.gpus_per_node,
            volumes=[{"name": name, **volume} for name, (_, volume) in volumes.items()],
            volume_mounts=[{"name": name, "mountPath": mount} for name, (mount, _) in volumes.items()],
            env_vars={"OCTO_RUNS": f"{path}/runs"},
        )
    except ConfigException as error:
        raise OctoError(f"no Kubernetes to submit to: {error}", fix="let KUBECONFIG name the cluster's file") from error


def _skypilot(target: Target) -> Any:
    """A cluster of SkyPilot's on Kubernetes, which it takes down itself; the code is this repository's last commit.

    Raises:
        OctoError: SkyPilot is missing.
    """
    import nemo_run

    try:
        import sky  # noqa: F401
    except ImportError as error:
        raise OctoError(
            f"SkyPilot cannot be imported: {error}",
            fix="pip install 'nemo-run[skypilot]==0.11.1' 'leptonai<0.28', in an environment of its own",
        ) from error
    claim, _, path = target.volume.partition(":")
    pod = {
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}],
        "containers": [{"volumeMounts": [{"name": "runs", "mountPath": path}]}],
    }
    return nemo_run.SkypilotExecutor(
        infra="k8s",
        gpus=target.gpu,
        gpus_per_node=target.shape.gpus_per_node,
        num_nodes=target.shape.nodes,
        container_image=f"docker:{target.image}",
        cluster_config_overrides={"kubernetes": {"pod_config": {"spec": pod}}},
        env_vars={"OCTO_RUNS": f"{path}/runs"},
        autodown=True,
        idle_minutes_to_autostop=IDLE_MINUTES,
    )


def _payload(job: Job, target: Target) -> str:
    """The lines of slurm/*.sh below their directives."""
    script = "rl" if isinstance(job.config, RLConfig) else "stable_200b"
    recipe, *overrides = job.argv[1:]
    return "\n".join(
        (
            "set +evx  # a trace would print what is secret",
            f"export OCTO_HOME={shlex.quote(str(target.checkout))}",
            'source "$OCTO_HOME/slurm/lib/job.sh" || exit 2',
            f"run_job {script} --recipe {shlex.join([recipe, *overrides])}",
        )
    )


def _check_there(tunnel: Any, target: Target) -> None:
    """Refuse to submit by ssh where the job would not find its site file.

    Raises:
        BadInput: so it is.
    """
    site = target.checkout / SITE
    if not tunnel.run(shlex.join(["test", "-f", str(site)]), warn=True).ok:
        raise BadInput(
            f"no site file {site} on {target.host}",
            fix=f"let --checkout name the repository's folder there; in it copy one of slurm/sites/ to {SITE} and "
            "fill it in",
        )


def _name(job: Job) -> str:
    assert job.config
    return job.config.name


def _follow(job: str, tunnel: Any, checkout: Path) -> str:
    """Wait until Slurm has ended the job for good: requeued and started again it is the same job.

    Where it may not be requeued it names the one that goes on. Returns what to call it, and why it was stopped before
    its run was done: by a STOP file, say, which ends it well.

    Raises:
        OctoError: it did not end well, or Slurm says nothing of it any more.
    """
    said, heard_s = "", time.monotonic()
    while True:
        answer = _ask(job, tunnel, checkout)
        state, _, words = answer.partition(" ")
        if state:
            heard_s = time.monotonic()
        elif time.monotonic() - heard_s > SILENCE_S:
            raise OctoError(f"Slurm says nothing of job {job}", fix="`octo runs list` says how far its run is")
        if answer != said:
            logger(__name__).info("job %s: %s", job, answer)
            said = answer
        if state in ENDED:
            words = words or "it had not started"
            raise OctoError(f"job {job} ended {state}: {words}", fix=f"$OCTO_RUNS/slurm/{job}.* has its records")
        if state == "COMPLETED":
            if not words.startswith(GOES_ON):
                return f"job {job} {words}" if words.startswith("stopped ") else f"job {job}"
            job = words.removeprefix(GOES_ON).partition(":")[0]
        time.sleep(POLL_S)


def _ask(job: str, tunnel: Any, checkout: Path) -> str:
    """What `STATE` says of a job; nothing if it cannot be asked."""
    from paramiko import SSHException

    with contextlib.suppress(OSError, EOFError, SSHException):  # the tunnel is opened again when it is used again
        return str(tunnel.run(shlex.join([str(checkout / STATE), job]), warn=True).stdout).rstrip("\n")
    return ""


@contextlib.contextmanager
def _home(folder: str) -> Iterator[str]:
    """Within the block NeMo-Run keeps its files in `folder`; yields where it kept them before."""
    from nemo_run.config import get_nemorun_home, set_nemorun_home

    before = get_nemorun_home()
    set_nemorun_home(folder)
    try:
        yield before
    finally:
        set_nemorun_home(before)


def require_nemo_run() -> None:
    """Refuse to go on without NeMo-Run.

    Raises:
        OctoError: it is not installed, or what it needs is.
    """
    try:
        import nemo_run  # noqa: F401
    except ImportError as error:
        raise OctoError(
            f"nemo-run cannot be imported: {error}",
            fix="pip install 'megatron_octo[launch]'; without it `sbatch slurm/stable_200b.sh` does the same",
        ) from error
