"""Hosts on one machine: each has its own network, PID, mount, UTS and IPC namespaces, a disk and an sshd.

One more host, the desk, is where a person calls `ray up`. The bridge that connects the hosts is in its network and
leads nowhere else. Ray's commands kill every Ray process that they see, so they run only in here. The kernel ends a
host's processes with its first one, and that with the process that started the host.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
NETWORK = "10.77.0."
DESK_IP = f"{NETWORK}1"
BUNDLE = "/mnt"
"""Where every host sees the files of Lab.bundle."""
HIDDEN = (Path("/tmp"), Path.home())
"""Folders of which each host has its own."""
ALONE = ("--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--net", "--mount-proc")
# The first process of a PID namespace must wait for the orphans of the others, as bash does.
INIT = "while :; do sleep 1000 & wait $!; done"


class LabError(RuntimeError):
    """A command in the lab failed; the message has its output."""


def missing() -> str | None:
    """What this machine lacks for a lab, in words; None if nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "unshare", "nsenter", "setpriv", "ssh", "ssh-keygen", "rsync", "git"):
        if not shutil.which(program):
            return f"the program {program} is not installed"
    if not Path("/usr/sbin/sshd").exists():
        return "sshd is not installed (package openssh-server)"
    tried = subprocess.run(
        ["unshare", *ALONE, "ip", "link", "add", "br0", "type", "bridge"], capture_output=True, text=True, timeout=60
    )
    return f"namespaces cannot be made here ({tried.stderr.strip()})" if tried.returncode else None


def _inside(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _needed() -> list[Path]:
    """What a host must see of this machine's hidden folders: Python, its packages, this checkout."""
    found = {ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    return sorted(path for path in found if any(_inside(path, folder) for folder in HIDDEN))


class Host:
    """One machine of the lab."""

    def __init__(self, name: str, ip: str, folder: Path, bundle: Path) -> None:
        """
        Args:
            folder: its disk, which survives `kill`.
            bundle: what every host sees at BUNDLE.
        """
        self.name, self.ip, self.folder, self.bundle = name, ip, folder, bundle
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self.process: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def start(self) -> None:
        """Start its namespaces and its first process; its network is added by Lab."""
        script = self.folder / "start.sh"
        script.write_text(self._script())
        with (self.folder / "console.txt").open("ab") as console:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *ALONE, "bash", str(script)],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        ready = self.folder / "ready"
        wait_for(ready.exists, 30, f"{self.name}: its first process")
        ready.unlink()
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.pid = int(children[0])

    def _script(self) -> str:
        lines = ["set -e", "mount --make-rprivate /", f"hostname {self.name}", f"cd {shlex.quote(str(self.folder))}"]
        lines += [
            "mkdir -p view/tmp view/home shm",
            "mount -t tmpfs -o size=2g none view/tmp",
            "mount --bind home view/home",
        ]
        for path in _needed():
            for folder, place in zip(HIDDEN, ("view/tmp", "view/home"), strict=True):
                if _inside(path, folder):
                    target = shlex.quote(f"{place}/{path.relative_to(folder)}")
                    lines += [f"mkdir -p {target}", f"mount --rbind {shlex.quote(str(path))} {target}"]
        lines += [f"mount --bind {shlex.quote(str(self.bundle))} {BUNDLE}", "mount -t tmpfs -o size=12g none /dev/shm"]
        lines += ["touch ready", f"mount --rbind view/home {HIDDEN[1]}", f"mount --rbind view/tmp {HIDDEN[0]}", "cd /"]
        lines += ["mount -t tmpfs none /run", "mkdir -p /run/sshd", INIT]
        return "\n".join(lines) + "\n"

    def enter(self, *, network_only: bool = False) -> list[str]:
        """The start of a command line that runs in this host."""
        return ["nsenter", "--target", str(self.pid), *(("--net",) if network_only else ("--all",))]

    def command(self, command: str) -> list[str]:
        """The command line that runs a shell command in this host."""
        home = str(HIDDEN[1])
        clean = ["env", "-i", f"HOME={home}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "USER=root"]
        return [*self.enter(), *clean, "bash", "-c", f"cd ~; {command}"]

    def run(self, command: str, *, timeout: float = 60) -> str:
        """Run a shell command in this host.

        Returns:
            What it printed on both streams.

        Raises:
            LabError: it failed, or did not end in time.
        """
        try:
            done = subprocess.run(
                self.command(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            text = (error.stdout or b"").decode(errors="replace")
            raise LabError(f"{self.name}: {command}: expected an end within {timeout} s\n{text}") from error
        if done.returncode:
            raise LabError(f"{self.name}: {command}: exit code {done.returncode}\n{done.stdout}")
        return done.stdout

    def serve(self, command: str, log: str) -> subprocess.Popen[bytes]:
        """Start a shell command that stays, its output in a file of the host's disk."""
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(
                self.command(f"exec {command}"), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def answers(self, url: str) -> bool:
        """Whether an HTTP server answers this host with success."""
        code = f"import urllib.request; urllib.request.urlopen('{url}', timeout=5)"
        try:
            self.run(f"{sys.executable} -c {shlex.quote(code)}", timeout=20)
        except LabError:
            return False
        return True

    def processes(self) -> list[str]:
        """The command lines of all its processes but its first and those of ssh."""
        listed = self.run("ps -eo pid=,args=").splitlines()
        return [
            line for line in listed if not any(word in line for word in ("start.sh", "sleep 1000", "ps -eo", "sshd"))
        ]

    def kill(self) -> None:
        """Power off: every process ends at once; the disk stays."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)
        wait_for(lambda: not Path(f"/proc/{self.pid}").exists(), 30, f"{self.name}: its end")


class Lab:
    """A desk, two hosts and the network between them."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: for the disks; on a real disk with some GB free.
        """
        self.folder = folder
        self.bundle = folder / "bundle"
        self.bundle.mkdir(parents=True)
        subprocess.run(["git", "clone", "--quiet", "--bare", str(ROOT), str(self.bundle / "sdan.git")], check=True)
        self.commit = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip()
        self.desk = Host("desk", DESK_IP, folder / "desk", self.bundle)
        self.head = Host("rc-head", f"{NETWORK}11", folder / "head", self.bundle)
        self.worker = Host("rc-worker", f"{NETWORK}12", folder / "worker", self.bundle)

    def start(self) -> None:
        """Start the desk and the hosts."""
        self.desk.start()
        for command in (
            "link set lo up",
            "link add br0 type bridge",
            f"addr add {DESK_IP}/24 dev br0",
            "link set br0 up",
        ):
            self.desk.run(f"ip {command}")
        self.desk.run("mkdir -p .ssh && ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519")
        key = (self.desk.home / ".ssh" / "id_ed25519.pub").read_text()
        for host in (self.head, self.worker):
            (host.home / ".ssh").mkdir(mode=0o700)
            (host.home / ".ssh" / "authorized_keys").write_text(key)
            (host.home / ".bashrc").touch()
            _install_python(host)
            self.power_on(host)

    def power_on(self, host: Host) -> None:
        """Start a host, connect it and start its sshd."""
        host.start()
        port = f"v{host.ip.rpartition('.')[2]}"
        wire = [*self.desk.enter(network_only=True), "ip", "link"]
        subprocess.run([*wire, "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid)], check=True)
        subprocess.run([*wire, "set", port, "master", "br0", "up"], check=True)
        for command in ("link set lo up", f"addr add {host.ip}/24 dev eth0", "link set eth0 up"):
            host.run(f"ip {command}")
        host.run("test -f .ssh/host_key || ssh-keygen -q -t ed25519 -N '' -f .ssh/host_key")
        options = ("HostKey=~/.ssh/host_key", "UsePAM=no", "StrictModes=no", "PermitRootLogin=prohibit-password")
        home = str(HIDDEN[1])
        host.run("/usr/sbin/sshd " + " ".join(f"-o {option.replace('~', home)}" for option in options))

    def stop(self) -> None:
        """End everything in the lab."""
        for host in (self.worker, self.head, self.desk):
            if host.process is not None and host.process.poll() is None:
                host.kill()


def _install_python(host: Host) -> None:
    """A virtual environment at ~/venv that sees the packages of this Python, and a pip that installs nothing else."""
    home, venv = str(HIDDEN[1]), host.home / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python3*/site-packages")
    tested = next(Path(path) for path in sys.path if path.endswith("site-packages")).resolve()
    (packages / "tested.pth").write_text(f"{tested}\n")
    for name in ("ray", "mlflow"):
        module = {"ray": "ray.scripts.scripts", "mlflow": "mlflow"}[name]
        script = venv / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {home}/venv/bin/python -m {module} "$@"\n')
        script.chmod(0o755)
    # The commands of cluster-local.yaml run as they are; pip is told to install the checkout alone, without a network.
    pip = host.home / ".config" / "pip"
    pip.mkdir(parents=True)
    (pip / "pip.conf").write_text("[install]\nno-deps = true\nno-build-isolation = false\nno-index = true\n")


def wait_for(ready, timeout: float, what: str) -> None:
    """Wait until `ready()` is true.

    Raises:
        LabError: it was not within `timeout` seconds.
    """
    end = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > end:
            raise LabError(f"{what}: expected within {timeout:.0f} s, got nothing")
        time.sleep(0.3)
