"""A real Slurm on this machine for tests: one controller, two compute nodes, munge; as root, all in one folder.

Debian's slurmd is built with multiple-slurmd support, so several nodes run on one host, each on a port of its own.
Every node claims 64 CPUs and 8 GPUs (empty files stand for the devices), so that a job script for a real cluster can
be submitted as it is; jobs share the real cores.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol")
CPUS_PER_NODE = 64
GPUS_PER_NODE = 8
MEMORY_PER_NODE_MB = 8000


def why_unavailable() -> str | None:
    """The reason why no cluster can be made here, or None."""
    if os.geteuid() != 0:
        return "Slurm tests need root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)" if missing else None


@dataclass(frozen=True)
class Cluster:
    """A running cluster. Commands go to it through `env`, which names its configuration file."""

    root: Path
    env: Mapping[str, str]

    def command(self, *arguments: str, extra_env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """The standard output of a Slurm command; raises RuntimeError with both outputs if it fails."""
        env = {**self.env, **(extra_env or {})}
        answer = subprocess.run(arguments, env=env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
        if answer.returncode:
            raise RuntimeError(f"{' '.join(arguments)} exited {answer.returncode}: {answer.stdout}{answer.stderr}")
        return answer.stdout + answer.stderr if "--test-only" in arguments else answer.stdout

    def submit(self, *arguments: str, extra_env: Mapping[str, str] | None = None, cwd: Path) -> int:
        """sbatch with these arguments in `cwd`; the job id."""
        return int(self.command("sbatch", "--parsable", *arguments, extra_env=extra_env, cwd=cwd))

    def job(self, job_id: int) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        text = self.command("scontrol", "show", "job", "--oneliner", str(job_id))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, job_id: int, states: set[str], *, timeout: float) -> dict[str, str]:
        """The job's fields once its state is one of `states`; TimeoutError with the last state seen otherwise."""
        deadline = time.monotonic() + timeout
        while (fields := self.job(job_id))["JobState"] not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} is {fields['JobState']}, not in {sorted(states)}, after {timeout} s")
            time.sleep(0.5)
        return fields

    def restart(self, job_id: int) -> None:
        """Start a requeued job now instead of after Slurm's two minutes; first its last run has to be over."""
        self.wait(job_id, {"PENDING"}, timeout=30)
        _wait_for_step_daemons(self.root, timeout=30)
        time.sleep(1.5)  # slurmd refuses a credential made in the second in which the last one was revoked
        self.command("scontrol", "update", f"JobId={job_id}", "StartTime=now")


@contextmanager
def running_cluster(nodes: int = 2) -> Iterator[Cluster]:
    """Bring a cluster up (about two seconds) and take it down by the process ids it wrote."""
    # Not pytest's tmp_path: munged refuses a socket below folders that are closed to other users.
    root = Path(tempfile.mkdtemp(prefix="exo-slurm-"))
    root.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    cluster = Cluster(root, {**env, "SLURM_CONF": str(root / "etc" / "slurm.conf")})
    try:
        _write_configuration(root, nodes)
        _start(cluster, nodes)
        yield cluster
    finally:
        _stop(cluster)
        shutil.rmtree(root, ignore_errors=True)


def _write_configuration(root: Path, nodes: int) -> None:
    for folder in ("etc", "run", "log", "state", "munge", "dev"):
        (root / folder).mkdir()
    (root / "munge").chmod(0o700)
    key = root / "munge" / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    for index in range(GPUS_PER_NODE):
        (root / "dev" / f"nvidia{index}").touch()
    host = socket.gethostname().split(".")[0]
    controller_port, *node_ports = _free_ports(nodes + 1)
    names = [f"node{index}" for index in range(1, nodes + 1)]
    lines = [_SLURM_CONF.format(root=root, host=host, port=controller_port)]
    for name, port in zip(names, node_ports, strict=True):
        (root / "state" / f"spool.{name}").mkdir()
        lines.append(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS_PER_NODE} "
            f"RealMemory={MEMORY_PER_NODE_MB} Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
        )
    lines.append("PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
    (root / "etc" / "slurm.conf").write_text("\n".join(lines) + "\n")
    devices = f"{root}/dev/nvidia[0-{GPUS_PER_NODE - 1}]"
    gres = [f"NodeName={name} Name=gpu File={devices}" for name in names]
    (root / "etc" / "gres.conf").write_text("\n".join(gres) + "\n")


_SLURM_CONF = """\
ClusterName=exotest
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.socket
CredType=cred/munge
SlurmctldPort={port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/state/spool.%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,requeue_delay=1
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=600
MessageTimeout=20
PropagateResourceLimits=NONE
GresTypes=gpu
SlurmdParameters=config_overrides
"""


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _start(cluster: Cluster, nodes: int) -> None:
    root = cluster.root
    cluster.command(
        "munged",
        f"--key-file={root}/munge/munge.key",
        f"--socket={root}/run/munge.socket",
        f"--pid-file={root}/run/munged.pid",
        f"--log-file={root}/munge/munged.log",
        f"--seed-file={root}/munge/munged.seed",
    )
    cluster.command("slurmctld", "-c", "-f", cluster.env["SLURM_CONF"])
    for index in range(1, nodes + 1):
        cluster.command("slurmd", "-c", "-N", f"node{index}", "-f", cluster.env["SLURM_CONF"])
    deadline = time.monotonic() + 30
    while True:
        idle = subprocess.run(
            ["sinfo", "-h", "-t", "idle", "-o", "%D"], env=cluster.env, capture_output=True, text=True, check=False
        )
        if idle.stdout.strip() == str(nodes):
            return
        if time.monotonic() > deadline:
            log = (root / "log" / "slurmctld.log").read_text()
            raise RuntimeError(f"nodes did not become idle: {idle.stdout}{idle.stderr}\n{log[-4000:]}")
        time.sleep(0.2)


def _stop(cluster: Cluster) -> None:
    subprocess.run(["scancel", "--user=root"], env=cluster.env, capture_output=True, timeout=30, check=False)
    with suppress(TimeoutError):
        _wait_for_step_daemons(cluster.root, timeout=15)
    daemons = {path.name: int(path.read_text()) for path in (cluster.root / "run").glob("*.pid")}
    munged = daemons.pop("munged.pid", None)
    _end(list(daemons.values()))
    _end([] if munged is None else [munged])


def _wait_for_step_daemons(root: Path, *, timeout: float) -> None:
    """Wait until no job step runs on any node; each has a socket in its node's spool folder."""
    deadline = time.monotonic() + timeout
    while list((root / "state").glob("spool.*/node*_*.*")):
        if time.monotonic() > deadline:
            raise TimeoutError(f"a job step is still running after {timeout} s")
        time.sleep(0.1)


def _end(pids: list[int]) -> None:
    """Terminate daemons and wait until they are gone, so that their folder can be removed."""
    for number, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + patience
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        pids = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
