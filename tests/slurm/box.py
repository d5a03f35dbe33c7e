"""A throw-away Slurm on one machine: real daemons, several virtual nodes, loopback only, all in one directory."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PACKAGES = "slurmctld slurmd slurm-client munge"
_DAEMONS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")

_CONF = """\
ClusterName=box
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
SlurmctldTimeout=60
SlurmdTimeout=60
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,requeue_setup_env_fail
SlurmdParameters=config_overrides
ReturnToService=0
JobRequeue=1
KillWait=10
MinJobAge=600
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=second Nodes=ALL MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The daemons and commands that this machine lacks."""
    return [name for name in _DAEMONS if shutil.which(name, path=_path()) is None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A running Slurm. Its nodes are n1, n2, ...; their names do not resolve, as on some clouds."""

    root: Path
    gpus: int  # a node

    @property
    def env(self) -> dict[str, str]:
        """What makes the Slurm commands speak to this cluster, and only to it."""
        outer = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        return outer | {"SLURM_CONF": str(self.root / "slurm.conf"), "GLOO_SOCKET_IFNAME": "lo"}

    def run(self, *command: str, timeout: float = 60) -> str:
        """What a Slurm command prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """Job id -> state, of all jobs that are not over."""
        lines = self.run("squeue", "-h", "-r", "-o", "%i %T").splitlines()
        return dict(line.split(maxsplit=1) for line in lines)


@contextmanager
def slurm_box(root: Path, *, nodes: int = 4, cpus: int = 4, gpus: int = 0) -> Iterator[Box]:
    """Start the daemons, wait until every node is idle, and stop them by their own process ids at the end."""
    box = Box(root=root, gpus=gpus)
    for part in ("state", "log", "dev", *(f"spool/n{node}" for node in range(1, nodes + 1))):
        (root / part).mkdir(parents=True, exist_ok=True)
    _write_configuration(root, nodes=nodes, cpus=cpus, gpus=gpus)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        daemons.append(_munged(root, box.env))
        conf = str(root / "slurm.conf")
        # -c: with kept state the nodes would look idle before a slurmd is up
        daemons.append(_daemon(root, box.env, "slurmctld", "-D", "-c", "-i", "-f", conf))
        for node in range(1, nodes + 1):
            daemons.append(_daemon(root, box.env, "slurmd", "-D", "-N", f"n{node}", "-f", conf))
        _wait_until_idle(box, nodes)
        yield box
        _end_jobs(box)
    finally:
        _stop(daemons)


def _write_configuration(root: Path, *, nodes: int, cpus: int, gpus: int) -> None:
    host = socket.gethostname().split(".")[0]
    ports = _free_ports(nodes + 1)
    lines = [_CONF.format(host=host, user=pwd.getpwuid(os.getuid()).pw_name, port=ports[0], root=root)]
    gres = f" Gres=gpu:{gpus}" if gpus else ""
    for node, port in enumerate(ports[1:], 1):
        lines.append(
            f"NodeName=n{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000{gres}\n"
        )
    lines.append("GresTypes=gpu\n" if gpus else "")
    (root / "slurm.conf").write_text("".join(lines))
    (root / "gres.conf").write_text(_fake_gpus(root, nodes, gpus) if gpus else "")


def _fake_gpus(root: Path, nodes: int, gpus: int) -> str:
    """Character devices like /dev/null: for those Slurm sets CUDA_VISIBLE_DEVICES, for plain files it does not."""
    for index in range(gpus):
        os.mknod(root / "dev" / f"nvidia{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    files = f"{root}/dev/nvidia[0-{gpus - 1}]"
    return f"NodeName=n[1-{nodes}] Name=gpu Flags=nvidia_gpu_env File={files}\n"


def _munged(root: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    key = root / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    places = (f"--key-file={key}", f"--socket={root}/munge.sock", f"--pid-file={root}/munged.pid")
    logs = (f"--log-file={root}/log/munged.log", f"--seed-file={root}/munge.seed")
    process = _daemon(root, env, "munged", "-F", "--force", *places, *logs)
    _wait_for(lambda: (root / "munge.sock").exists(), f"munged did not start; see {root}/log")
    return process


def _daemon(root: Path, env: dict[str, str], name: str, *arguments: str) -> subprocess.Popen[bytes]:
    with (root / "log" / f"{name}.out").open("ab") as log:
        return subprocess.Popen(
            [name, *arguments],
            env=env | {"PATH": _path()},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _path() -> str:
    """Daemons lie where a user's PATH often does not lead."""
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def _wait_until_idle(box: Box, nodes: int) -> None:
    def idle() -> bool:
        command = ["sinfo", "-h", "-p", "debug", "-t", "idle", "-o", "%D"]
        shown = subprocess.run(command, env=box.env, capture_output=True, text=True, timeout=30, check=False)
        return shown.stdout.strip() == str(nodes)

    _wait_for(idle, f"Slurm is not up; see {box.root}/log")


def _wait_for(ready: object, complaint: str, timeout: float = 60) -> None:
    assert callable(ready)
    end = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < end, complaint
        time.sleep(0.1)


def _end_jobs(box: Box) -> None:
    """Jobs of a test that failed would outlive the daemons."""
    if left := list(box.jobs()):
        box.run("scancel", *left)
        _wait_for(lambda: not box.jobs(), f"jobs {left} do not end")


def _stop(daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    for daemon in reversed(daemons):
        daemon.send_signal(signal.SIGTERM)
    for daemon in reversed(daemons):
        try:
            daemon.wait(timeout=15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
