"""A private SLURM cluster of two virtual nodes on this one host, with two stand-in GPUs each: no root, no network.

`python -m tests.slurm.cluster up FOLDER` starts one and prints what to export; `down FOLDER` ends it, `kill FOLDER
node2` pulls a node's plug, `start FOLDER node2` brings it back. Ports are free ones and every file is in FOLDER, so
several clusters can run side by side. One with accounts (`up FOLDER ACCOUNT ...`) has a database of jobs, slurmdbd on a
MariaDB of its own, as most sites do.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path

import psutil

PACKAGES = "slurmctld slurmd slurm-client munge slurmdbd mariadb-server"
APT = f"apt-get install -y --no-install-recommends {PACKAGES}"
NODES = ("node1", "node2")
IN_SERVICE = {"idle", "mixed", "allocated", "planned"}
"""States of a node that takes jobs, or is kept for one that waits."""
COMMANDS = ("srun", "sbatch", "squeue", "scancel", "sinfo", "scontrol", "sacct", "sacctmgr", "sshare", "sstat")
DAEMONS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd")
SYSTEM_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"


def _command(name: str) -> str | None:
    """Where a command of SLURM is, the directories of daemons included, those of other clusters' wrappers not."""
    return shutil.which(name, path=os.pathsep.join([*_outside_clusters(os.environ["PATH"]), SYSTEM_PATH]))


def _outside_clusters(path: str) -> list[str]:
    """The folders of a PATH that are no `bin` of a cluster's."""
    return [folder for folder in path.split(os.pathsep) if not _is_of_a_cluster(folder)]


def _is_of_a_cluster(folder: str) -> bool:
    return Path(folder).name == "bin" and (Path(folder).parent / "etc/slurm.conf").exists()


CONFIG = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
SlurmctldPort={port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
{accounting}
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=2
ReturnToService=2
MinJobAge=600
KillWait=8
OverTimeLimit=0
SlurmctldTimeout=60
SlurmdTimeout=60
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=cpu Nodes=node1,node2 Default=YES MaxTime=300 State=UP GraceTime=90
PartitionName=gpu Nodes=node1,node2 MaxTime=300 State=UP GraceTime=90
PartitionName=urgent Nodes=node1,node2 MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""

NO_ACCOUNTING = """\
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none"""
ACCOUNTING = """\
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={root}/run/munge.sock
AccountingStorageEnforce=associations
AccountingStorageTRES=gres/gpu"""
DATABASE_DAEMON = """\
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.sock
LogFile={root}/log/slurmdbd.log
PidFile={root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm
"""
DATABASE_USER = """\
CREATE DATABASE IF NOT EXISTS slurm;
CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY '{password}';
GRANT ALL ON slurm.* TO slurm@'127.0.0.1';
"""


def missing() -> str | None:
    """What to type where SLURM is not installed; None where it is."""
    found = [_command(name) for name in (*DAEMONS, "sbatch", "srun")]
    return None if all(found) else f"the tests need Debian's SLURM, which `make test-slurm` does not install: {APT}"


@dataclass(frozen=True)
class Cluster:
    """One cluster, all of whose files are below `root`."""

    root: Path
    cpus: int = 8
    """Virtual cores of each node."""
    accounts: tuple[str, ...] = ()
    """What this user can charge; none: a cluster without accounting."""

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with the cluster's commands first on PATH."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return {**clean, "PATH": os.pathsep.join([f"{self.root}/bin", *_outside_clusters(os.environ["PATH"])])}

    def up(self) -> Cluster:
        """Start whatever does not run. Raises RuntimeError with the daemons' last lines when it takes too long."""
        for folder in ("etc", "bin", "state", "log", "run", "spool/node1", "spool/node2"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)
        if not (self.root / "etc/slurm.conf").exists():
            self._configure()
        for name in self._daemons:
            if not self._alive(name):
                self._start(name)
            if name == "slurmdbd":
                self._open_accounts()
        for node in NODES:
            self.wait_for_node(node, IN_SERVICE)
        return self

    def down(self) -> None:
        """Cancel all jobs and end every daemon; what does not end in 5 s is killed."""
        if self._alive("slurmctld"):
            self.call("scancel", f"--user={getuser()}", check=False)
            self._wait(lambda: not self.call("squeue", "-h", check=False).strip(), 30)
        for name in reversed(self._daemons):
            if not self._alive(name):
                continue
            process = psutil.Process(self._pid(name))
            process.terminate()
            if not self._wait(lambda process=process: _ended(process), 5):
                process.kill()
        for node in NODES:
            for pid in self._processes_of(node):
                os.kill(pid, signal.SIGKILL)

    def kill_node(self, node: str) -> None:
        """Pull the plug: its daemon, its job steps and every process they started are gone at once."""
        victims = self._processes_of(node)
        if self._alive(f"slurmd-{node}"):
            victims.add(self._pid(f"slurmd-{node}"))
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def start_node(self, node: str, hidden: Path | None = None) -> None:
        """Bring a killed node back; on it, `hidden` is an empty folder of its own, as if no file system were shared.

        That takes the superuser's rights: RuntimeError without them.
        """
        mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(hidden)]
        self._start(f"slurmd-{node}", mount if hidden else [])
        self.wait_for_node(node, IN_SERVICE)

    def wait_for_node(self, node: str, states: set[str], seconds: float = 90) -> None:
        """Wait until SLURM says that the node is in one of `states`."""

        def there() -> bool:
            return self.call("sinfo", "-h", "-N", "-n", node, "-o", "%T", check=False).split("\n")[0].strip() in states

        if not self._wait(there, seconds):
            logs = "\n".join(p.read_text()[-600:] for p in sorted((self.root / "log").glob("*.log")))
            raise RuntimeError(f"{node} is not {states} after {seconds} s\n{logs}")

    def call(self, *command: str, check: bool = True) -> str:
        """What one of the cluster's commands prints, within 60 s."""
        done = subprocess.run(
            [f"{self.root}/bin/{command[0]}", *command[1:]], text=True, capture_output=True, timeout=60
        )
        assert not check or done.returncode == 0, (command, done.stderr)
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """State of every job that SLURM still knows, ended ones too."""
        lines = self.call("squeue", "-h", "--states=all", "-o", "%i %T").split("\n")
        return dict(line.split() for line in lines if line.strip())

    @property
    def _daemons(self) -> list[str]:
        """In the order in which they start."""
        database = ["mariadbd", "slurmdbd"] if (self.root / "etc/slurmdbd.conf").exists() else []
        return ["munged", *database, "slurmctld", *(f"slurmd-{node}" for node in NODES)]

    def _open_accounts(self) -> None:
        """What is there already stays."""

        def answers() -> bool:
            try:
                return bool(self.call("sacctmgr", "--noheader", "list", "user", check=False).strip())
            except subprocess.TimeoutExpired:
                return False

        if not self._wait(answers, 60):
            raise RuntimeError(f"slurmdbd does not answer\n{(self.root / 'log/slurmdbd.log').read_text()[-600:]}")
        for words in (["cluster", "virtual"], *(["account", it] for it in self.accounts)):
            self.call("sacctmgr", "--immediate", "add", *words, check=False)
        for account in self.accounts:
            self.call("sacctmgr", "--immediate", "add", "user", getuser(), f"account={account}", check=False)

    def _configure_accounting(self, host: str, port: int) -> str:
        """The files of the database's daemons; what slurm.conf says of them."""
        if not self.accounts:
            return NO_ACCOUNTING
        password = os.urandom(16).hex()
        values = {"host": host, "user": getuser(), "root": self.root, "port": port, "database_port": port + 1}
        for name, text in (("slurmdbd.conf", DATABASE_DAEMON), ("users.sql", DATABASE_USER)):
            file = self.root / "etc" / name
            file.touch(0o600)
            file.write_text(text.format(**values, password=password))
        (self.root / "etc/database.port").write_text(str(port + 1))
        return ACCOUNTING.format(**values)

    def _configure(self) -> None:
        host = socket.gethostname().partition(".")[0]
        port = _free_ports(5)
        address = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={self.cpus} RealMemory=10000 Gres=gpu:2"
        nodes = "\n".join(f"NodeName={node} Port={port + 1 + i} {address}" for i, node in enumerate(NODES))
        etc = self.root / "etc"
        (etc / "slurm.conf").write_text(
            CONFIG.format(
                host=host,
                user=getuser(),
                root=self.root,
                port=port,
                nodes=nodes,
                accounting=self._configure_accounting(host, port + 3),
            )
        )
        for gpu in (0, 1):
            (self.root / f"run/nvidia{gpu}").symlink_to("/dev/null")
        (etc / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={self.root}/run/nvidia[0-1]\n")
        (etc / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (etc / "munge.key").write_bytes(os.urandom(1024))
        (etc / "munge.key").chmod(0o600)
        for name in COMMANDS:
            wrapper = self.root / "bin" / name
            # jobs lose their SLURM_* variables on the way through Snakemake, so the command itself knows its cluster
            wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={etc}/slurm.conf exec {_command(name) or name} "$@"\n')
            wrapper.chmod(0o755)

    def _start(self, name: str, prefix: Sequence[str] = ()) -> None:
        root = self.root
        conf = f"{root}/etc/slurm.conf"
        if name == "munged":
            (root / "run/munge.sock").unlink(missing_ok=True)
            command = ["munged", f"--key-file={root}/etc/munge.key", f"--socket={root}/run/munge.sock"]
            command += [f"--pid-file={root}/run/munged.pid", f"--log-file={root}/log/munged.log"]
            command += [f"--seed-file={root}/run/munged.seed"]
        elif name == "mariadbd":
            return self._start_database()
        elif name == "slurmdbd":
            command = ["slurmdbd"]
        elif name == "slurmctld":
            command = ["slurmctld", "-c", "-f", conf]
        else:
            command = ["slurmd", "-f", conf, "-N", name.removeprefix("slurmd-")]
        environment = {**self.environment, "PATH": f"{SYSTEM_PATH}:{os.environ['PATH']}", "SLURM_CONF": conf}
        done = subprocess.run([*prefix, *command], env=environment, text=True, capture_output=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        self._wait(lambda: self._alive(name), 30)

    def _start_database(self) -> None:
        """MariaDB, its files in `database/`, reached by its port on this host alone."""
        root, data = self.root, self.root / "database"
        user = [f"--user={getuser()}"] if os.geteuid() == 0 else []
        if not data.exists():
            install = [_command("mariadb-install-db") or "mariadb-install-db", "--no-defaults", f"--datadir={data}"]
            subprocess.run([*install, "--skip-test-db", *user], capture_output=True, check=True, timeout=120)
        port = (root / "etc/database.port").read_text()
        options = ["--no-defaults", f"--datadir={data}", f"--socket={root}/run/database.sock", f"--port={port}", *user]
        options += ["--bind-address=127.0.0.1", "--skip-name-resolve", f"--init-file={root}/etc/users.sql"]
        options += [f"--pid-file={root}/run/mariadbd.pid", f"--log-error={root}/log/mariadbd.log"]
        options += ["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M"]
        subprocess.Popen(
            [_command("mariadbd") or "mariadbd", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if not self._wait(lambda: self._alive("mariadbd") and _answers(int(port)), 60):
            raise RuntimeError(f"mariadbd: {(root / 'log/mariadbd.log').read_text()[-600:]}")

    def _pid(self, name: str) -> int:
        return int((self.root / f"run/{name}.pid").read_text())

    def _alive(self, name: str) -> bool:
        try:
            return not _ended(psutil.Process(self._pid(name)))
        except (OSError, ValueError, psutil.NoSuchProcess):
            return False

    def _processes_of(self, node: str) -> set[int]:
        """Whatever a node's job steps started, and the step daemons above them."""
        found = set()
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                folders = environment.get("PATH", "").split(os.pathsep)
                cluster = next((folder for folder in folders if _is_of_a_cluster(folder)), None)
                if environment.get("SLURMD_NODENAME") != node or cluster != f"{self.root}/bin":
                    continue
                found.add(process.pid)
                found |= {p.pid for p in process.parents() if "slurmstepd" in " ".join(p.cmdline())}
            except (psutil.Error, OSError):
                continue
        return found

    @staticmethod
    def _wait(condition, seconds: float) -> bool:  # type: ignore[no-untyped-def]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.1)
        return False


def _ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports."""
    for first in range(21000 + os.getpid() % 500 * 10, 32000, count):
        sockets = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.create_server(("127.0.0.1", port)))
            return first
        except OSError:
            continue
        finally:
            for s in sockets:
                s.close()
    raise RuntimeError("no free ports")


def main() -> int:
    """The command line."""
    if problem := missing():
        print(problem, file=sys.stderr)
        return 1
    command = sys.argv[1]
    if command == "check":
        return 0
    cluster = Cluster(Path(sys.argv[2]).resolve(), accounts=tuple(sys.argv[3:]) if command == "up" else ())
    if command == "up":
        cluster.up()
        print(f"export PATH={cluster.root}/bin:$PATH")
    elif command == "down":
        cluster.down()
        shutil.rmtree(cluster.root, ignore_errors=True)
    elif command == "kill":
        cluster.kill_node(sys.argv[3])
    elif command == "start":
        cluster.start_node(sys.argv[3])
    return 0


if __name__ == "__main__":
    sys.exit(main())
