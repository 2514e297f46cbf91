"""The nodes and jobs of the cluster, read with SLURM's commands."""

import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tubelet.config import ConfigError, nearest
from tubelet.slurm.options import SlurmConfig

# States of jobs that wait, run or are ending.
IN_QUEUE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "STOPPED")


@dataclass(frozen=True)
class Node:
    """A node in a partition.

    Attributes:
        gpus: Number of GPUs, from `Gres`.
        minutes: Time limit of the partition; None without a limit.
    """

    partition: str
    name: str
    address: str
    cpus: int
    gpus: int
    minutes: int | None


def nodes() -> list[Node]:
    """All nodes, once for each partition. Raises ConfigError if SLURM is missing or does not respond."""
    check_installed()
    sinfo = subprocess.run(["sinfo", "-h", "-N", "-o", "%R|%N|%o|%c|%G|%l"], capture_output=True, text=True)
    if sinfo.returncode:
        raise ConfigError(f"SLURM does not respond: {sinfo.stderr.strip()}")
    return [_node(*line.split("|")) for line in sinfo.stdout.split()]


def check_installed() -> None:
    """Raise ConfigError if SLURM is not installed here."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "no sbatch on the PATH: submit SLURM jobs from a login node of the cluster. To run on this machine: "
            "tubelet train (or eval) --config … [--devices cuda:0 cuda:1 …]; to see what would be submitted: "
            "--dry-run"
        )


def check(requested: SlurmConfig, folder: Path, nodes: list[Node]) -> None:
    """Raise ConfigError if the nodes do not have the requested resources, or cannot read `folder`."""
    partitions = {node.partition for node in nodes}
    if requested.partition is not None and requested.partition not in partitions:
        raise ConfigError(
            f"slurm.partition: '{requested.partition}' does not exist. {nearest(requested.partition, partitions)}"
        )
    if requested.partition:
        nodes = [node for node in nodes if node.partition == requested.partition]
    where = f"partition {requested.partition}" if requested.partition else "this cluster"
    gpus, cpus = max(node.gpus for node in nodes), max(node.cpus for node in nodes)
    if requested.gpus_per_node > gpus:
        raise ConfigError(
            f"slurm.tasks_per_node: {requested.tasks_per_node} tasks need as many GPUs, a node of {where} has {gpus}. "
            "Request more nodes with fewer tasks each" + ("" if gpus else ", or set slurm.device=cpu")
        )
    if requested.tasks_per_node * (requested.cpus_per_task or 1) > cpus:
        raise ConfigError(
            f"slurm.cpus_per_task: {requested.tasks_per_node} tasks × {requested.cpus_per_task or 1} CPU cores, "
            f"a node of {where} has {cpus}"
        )
    if requested.nodes > (count := len({node.name for node in nodes})):
        raise ConfigError(f"slurm.nodes: {requested.nodes}, but {where} has {count}; the job would never start")
    limits = [node.minutes for node in nodes if node.minutes is not None]
    if len(limits) == len(nodes) and requested.time > max(limits):
        raise ConfigError(
            f"slurm.time: {requested.time} minutes, but {where} allows {max(limits)}; longer runs are requeued"
        )
    _check_visible(folder, {node.address for node in nodes})


def show(job: str) -> dict[str, str]:
    """What `scontrol show job` prints for a job (`12` or `12_3`); empty if the controller does not know it any more."""
    scontrol = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    first = scontrol.stdout.split("\n", 1)[0]
    return {} if scontrol.returncode else dict(re.findall(r"(\S+?)=(.*?)(?=\s+\S+?=|\s*$)", first))


def state(job: str) -> tuple[str, str]:
    """(state, nodes) of a job: from the controller, or from the accounting if the controller does not know it."""
    if live := show(job):
        return live["JobState"], live["NodeList"].replace("(null)", "")
    if shutil.which("sacct") is None:  # a cluster without accounting
        return "UNKNOWN", ""
    command = ["sacct", "-X", "-n", "-P", "-o", "State,NodeList", "-j", job]
    output = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not output:
        return "UNKNOWN", ""
    name, node_list = output.split("\n")[-1].split("|")
    return name.split()[0], node_list  # `CANCELLED by 1000`


def _node(partition: str, name: str, address: str, cpus: str, gres: str, limit: str) -> Node:
    gpus = sum(int(count) for count in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", gres))
    return Node(partition, name, address, int(cpus.rstrip("+")), gpus, _minutes(limit))


def _minutes(limit: str) -> int | None:
    """Minutes of a limit like `30:00`, `4:00:00` or `2-12:00:00`; None for `infinite`."""
    if not limit[0].isdigit():
        return None
    days, _, clock = limit.rpartition("-")
    hours, minutes, _seconds = (["0"] * 3 + clock.split(":"))[-3:]
    return int(days or 0) * 1440 + int(hours) * 60 + int(minutes)


def _check_visible(folder: Path, addresses: set[str]) -> None:
    """Raise ConfigError for a folder in /tmp or in memory, which other machines do not see."""
    if addresses <= {"localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn()}:
        return
    path = folder.resolve()
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    kind = max((len(mount), kind) for mount, kind in mounts if path.is_relative_to(mount))[1]
    local = next((local for local in ("/tmp", "/var/tmp", "/dev/shm") if path.is_relative_to(local)), None)
    if local is not None or kind in ("tmpfs", "ramfs"):
        raise ConfigError(
            f"folder: {path} is on this machine only ({local or kind}), the nodes would not see it. "
            "Choose a folder on a shared disk: --folder …"
        )
