"""What the cluster has and what it does now, asked of SLURM's own commands."""

import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tubelet.config import ConfigError, nearest
from tubelet.slurm.options import SlurmConfig

# Where a job is still in the queue: it waits, runs, or is being ended.
IN_QUEUE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "STOPPED")


@dataclass(frozen=True)
class Node:
    """A node in a partition. gpus: as its `Gres` says; minutes: the partition's longest, None without a limit."""

    partition: str
    name: str
    address: str
    cpus: int
    gpus: int
    minutes: int | None


def nodes() -> list[Node]:
    """All nodes, once for each partition. Raises ConfigError where SLURM is missing or does not answer."""
    check_installed()
    said = subprocess.run(["sinfo", "-h", "-N", "-o", "%R|%N|%o|%c|%G|%l"], capture_output=True, text=True)
    if said.returncode:
        raise ConfigError(f"SLURM does not answer: {said.stderr.strip()}")
    return [_node(*line.split("|")) for line in said.stdout.split()]


def check_installed() -> None:
    """Raises ConfigError where there is no SLURM, with what to do instead."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "no sbatch on the PATH: SLURM jobs are submitted from a login node of the cluster. To run on this machine: "
            "python -m app.main (or evals.main) --fname … [--devices cuda:0 cuda:1 …]; to see what would be submitted: "
            "--dry-run"
        )


def check(asked: SlurmConfig, folder: Path, known: list[Node]) -> None:
    """Raises ConfigError when the nodes cannot give what is asked, or do not see the folder."""
    partitions = {node.partition for node in known}
    if asked.partition is not None and asked.partition not in partitions:
        raise ConfigError(
            f"slurm.partition: '{asked.partition}' is unknown here. {nearest(asked.partition, partitions)}"
        )
    there = [node for node in known if node.partition == asked.partition] if asked.partition else known
    where = f"partition {asked.partition}" if asked.partition else "this cluster"
    gpus, cpus = max(node.gpus for node in there), max(node.cpus for node in there)
    if asked.gpus_per_node > gpus:
        raise ConfigError(
            f"slurm.tasks_per_node: {asked.tasks_per_node} tasks need as many GPUs, a node of {where} has {gpus}. "
            "Ask for more nodes with fewer tasks each" + ("" if gpus else ", or say slurm.device=cpu")
        )
    if asked.tasks_per_node * (asked.cpus_per_task or 1) > cpus:
        raise ConfigError(
            f"slurm.cpus_per_task: {asked.tasks_per_node} tasks × {asked.cpus_per_task or 1} CPU cores, "
            f"a node of {where} has {cpus}"
        )
    if asked.nodes > (count := len({node.name for node in there})):
        raise ConfigError(f"slurm.nodes: {asked.nodes}, but {where} has {count}; the job would wait for ever")
    longest = [node.minutes for node in there]
    if None not in longest and asked.time > max(longest):
        raise ConfigError(f"slurm.time: {asked.time} minutes, but {where} allows {max(longest)}; the run is requeued")
    _check_visible(folder, {node.address for node in there})


def show(job: str) -> dict[str, str]:
    """What the controller knows of a job (`12` or `12_3`), by SLURM's names; empty when it has forgotten it."""
    said = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    first = said.stdout.split("\n", 1)[0]
    return {} if said.returncode else dict(re.findall(r"(\S+?)=(.*?)(?=\s+\S+?=|\s*$)", first))


def state(job: str) -> tuple[str, str]:
    """(state, nodes) of a job: from the controller, or from the accounting when the controller has forgotten it."""
    if live := show(job):
        return live["JobState"], live["NodeList"].replace("(null)", "")
    command = ["sacct", "-X", "-n", "-P", "-o", "State,NodeList", "-j", job]
    said = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not said:
        return "UNKNOWN", ""
    name, where = said.split("\n")[-1].split("|")
    return name.split()[0], where  # `CANCELLED by 1000`


def _node(partition: str, name: str, address: str, cpus: str, gres: str, limit: str) -> Node:
    gpus = sum(int(count) for count in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", gres))
    return Node(partition, name, address, int(cpus.rstrip("+")), gpus, _minutes(limit))


def _minutes(limit: str) -> int | None:
    """`infinite`, `30:00`, `4:00:00` or `2-12:00:00` in minutes."""
    if not limit[0].isdigit():
        return None
    days, _, clock = limit.rpartition("-")
    hours, minutes, _seconds = (["0"] * 3 + clock.split(":"))[-3:]
    return int(days or 0) * 1440 + int(hours) * 60 + int(minutes)


def _check_visible(folder: Path, addresses: set[str]) -> None:
    """A disk in memory, or /tmp, is another one on each machine."""
    if addresses <= {"localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn()}:
        return
    path = folder.resolve()
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    kind = max((len(place), kind) for place, kind in mounts if path.is_relative_to(place))[1]
    own = next((place for place in ("/tmp", "/var/tmp", "/dev/shm") if path.is_relative_to(place)), None)
    if own is not None or kind in ("tmpfs", "ramfs"):
        raise ConfigError(
            f"folder: {path} is on this machine only ({own or kind}): the nodes would not see it. "
            "Choose a folder on a shared disk: --folder …"
        )
