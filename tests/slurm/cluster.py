"""A real SLURM on this machine for tests: munge, MariaDB, slurmdbd, slurmctld and two slurmd, on loopback, as root.

    python tests/slurm/cluster.py FOLDER

starts it, prints the `export` line that a shell needs to use it, and stops it on Ctrl-C.
All files are in FOLDER; nothing in /etc is changed. Debian's packages: see PACKAGES.
"""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = "slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core"
PROGRAMS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch", "srun", "unshare")
NODES = ("n0", "n1")
GPUS = CPUS = 8

# A requeued job waits for cred_expire seconds; a preempted one gets the stop signal GraceTime seconds before its end.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/spool/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdTimeout=60
KillWait=20
CompleteWait=0
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PriorityType=priority/basic
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={database_port}
AccountingStoragePass={folder}/munge/socket
AccountingStorageTRES=gres/gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=1-00:00:00 DefaultTime=60 PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Gres=gpu:{gpus}\n"
SLURMDBD_CONF = """
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={database_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_accounting
LogFile={folder}/slurmdbd.log
PidFile={folder}/state/slurmdbd.pid
"""


def missing() -> str | None:
    """Why the cluster cannot run on this machine; None if it can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install --no-install-recommends {PACKAGES}"
    if os.getuid() != 0:
        return "the test cluster's daemons are started as root"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        return "no permission to create namespaces (CAP_SYS_ADMIN), in which each node has its own host name"
    return None


class Cluster:
    """Runs in a `with` block; processes with the environment variables `environment` use it."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment = environment | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool", "munge", "devices", "database"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        try:
            self._write_configuration()
            self._start_munge()
            self._start_accounting()
            self._start("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"), host="localhost")
            for name in NODES:
                (self.folder / "spool" / name).mkdir()
                self._start("slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf"), host=name)
            self._wait_for("accounting", lambda: self.command("sacctmgr -n list cluster test format=ControlHost"))
            self._wait_for(
                "idle nodes", lambda: self.command("sinfo -h -N -p main -t idle -o %N").split() == list(NODES)
            )
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.command("scancel --user=root")
        try:
            self._wait_for("end of all jobs", lambda: not self.command("squeue -h -t R,CG,S -o %A"))
        finally:
            self._stop()

    def _stop(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(30)

    def command(self, command: str) -> str:
        """The output of a SLURM command. Raises CalledProcessError if it fails."""
        return subprocess.run(
            shlex.split(command), env=self.environment, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    def _write_configuration(self) -> None:
        port, database_port, *node_ports = _free_ports(2 + len(NODES))
        values = {"folder": self.folder, "port": port, "database_port": database_port}
        nodes = [
            NODE.format(name=name, port=port, cpus=CPUS, gpus=GPUS)
            for name, port in zip(NODES, node_ports, strict=True)
        ]
        text = SLURM_CONF.format(**values).split("PartitionName", 1)
        (self.folder / "slurm.conf").write_text(text[0] + "".join(nodes) + "PartitionName" + text[1])
        (self.folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**values))
        (self.folder / "slurmdbd.conf").chmod(0o600)
        for gpu in range(GPUS):  # SLURM only checks that the file is a device
            (self.folder / "devices" / f"nvidia{gpu}").symlink_to("/dev/null")
        gres = f"AutoDetect=off\nName=gpu File={self.folder}/devices/nvidia[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gres)
        hosts = f"127.0.0.1 localhost {' '.join(NODES)} {socket.gethostname()}\n"
        (self.folder / "hosts").write_text(hosts + Path("/etc/hosts").read_text())

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        munge.chmod(0o755)
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        self._start(
            "munged", "--foreground", "--force", *(f"--{option}={munge / name}" for option, name in files.items())
        )
        self._wait_for("munge", lambda: self.command(f"munge -n -S {munge}/socket"))

    def _start_accounting(self) -> None:
        database = self.folder / "database"
        options = ["--no-defaults", "--user=root", f"--datadir={database}", f"--socket={self.folder}/database.socket"]
        options += [f"--pid-file={self.folder}/database.pid", "--skip-networking", "--innodb-buffer-pool-size=64M"]
        options += ["--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0", "--performance-schema=OFF"]
        tables = [f"/usr/share/mysql/mysql_system_tables{part}.sql" for part in ("", "_data")]
        bootstrap = "create database mysql;\nuse mysql;\nset @auth_root_socket='root';\n"
        bootstrap += "\n".join(Path(table).read_text(encoding="utf-8") for table in tables)
        command = ["mariadbd", *options, "--bootstrap"]
        with open(self.folder / "bootstrap.out", "w") as output:
            subprocess.run(
                command, input=bootstrap, text=True, env=self.environment, stdout=output, stderr=output, check=True
            )
        self._start("mariadbd", *options)
        self._wait_for("MariaDB", (self.folder / "database.socket").exists)
        self.environment["MYSQL_UNIX_PORT"] = str(self.folder / "database.socket")
        self._start("slurmdbd", "-D", host="localhost")
        self._wait_for("slurmdbd", lambda: self.command("sacctmgr -n list cluster") is not None)

    def _start(self, program: str, *arguments: str, host: str | None = None) -> None:
        command = [program, *arguments]
        if host is not None:  # with its own host name, and with all node names resolving to this machine
            script = f'hostname {host} && mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
            command = ["unshare", "--uts", "--mount", "--propagation", "slave", "bash", "-c", script, "-", *command]
        with open(self.folder / f"{program}-{host}.out", "ab") as output:
            self.daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            )

    def _wait_for(self, event: str, condition: Callable[[], object]) -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with contextlib.suppress(subprocess.SubprocessError):
                if condition():
                    return
            time.sleep(0.1)
        raise TimeoutError(f"no {event} after 30 s; see the logs in {self.folder}")


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Cluster(Path(sys.argv[1]).absolute()) as running, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={running.environment['SLURM_CONF']}", flush=True)
        signal.pause()
