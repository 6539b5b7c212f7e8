"""A Slurm cluster of three virtual nodes on this machine: Debian's packages, and loopback only."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

NODES = ("n1", "n2", "n3")
CONF = """
ClusterName=modjax
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Context manager of a running cluster, whose commands find it by $SLURM_CONF."""

    def __init__(self, folder: Path, cores: int = 2):
        host, ports = socket.gethostname(), _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cores} "
            "RealMemory=4000"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.conf.write_text(CONF.format(host=host, port=ports[0], folder=folder, nodes=nodes))
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()

    def __enter__(self) -> "Cluster":
        os.environ["SLURM_CONF"] = str(self.conf)
        for command in (["slurmctld", "-c"], *(["slurmd", "-c", "-N", node] for node in NODES)):
            program = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
            subprocess.run([program, *command[1:], "-f", self.conf], check=True, timeout=60)
        wait_for(lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D").split() == ["3"], 60)
        return self

    def __exit__(self, *exc) -> None:
        subprocess.run(["scancel", f"--user={os.environ.get('USER', 'root')}"], timeout=60)
        time.sleep(1)
        for name in ("slurmctld", *(f"slurmd-{node}" for node in NODES)):
            pid = int((self.folder / f"{name}.pid").read_text())
            os.kill(pid, signal.SIGTERM)
        del os.environ["SLURM_CONF"]

    def call(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.stdout

    def jobs(self, *more: str) -> list[list[str]]:
        """Returns id, state, name and number in the array of the jobs under way."""
        lines = self.call("squeue", "-h", "-r", "-o", "%i|%T|%j|%K", *more).splitlines()
        return [line.split("|") for line in lines]

    def hurry(self) -> None:
        """Starts requeued jobs at once, which would wait two minutes."""
        for job, *_ in self.jobs("--states=PENDING"):
            self.call("scontrol", "update", f"jobid={job}", "StartTime=now")


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
