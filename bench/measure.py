"""What is measured and how: CPU time of a process tree, load by wrk and by our own client."""

import json
import os
import re
import subprocess
import time

TICK = 1_000_000 / os.sysconf("SC_CLK_TCK")


class Cores:
    """Which cores the proxy, the upstream and the load run on."""

    def __init__(self):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            raise SystemExit("two cores are needed: one for the proxy, one for the rest")
        self.proxy = [cores[0]]
        self.upstream = [cores[1]]
        self.load = cores[2:4] if len(cores) > 2 else [cores[1]]
        # Two cores: what a change of the configuration costs must not come out of the worker's core.
        self.pair = cores[:2]

    def __str__(self):
        shared = " (shared: absolute figures are too high)" if self.load == self.upstream else ""
        return f"proxy on core {self.proxy}, upstream on {self.upstream}, load on {self.load}{shared}"


def pinned(cores, command):
    return ["taskset", "-c", ",".join(map(str, cores)), *command]


def tree(root):
    """The pids of a process and all below it."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as stat:
                    parents[int(name)] = int(stat.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
    pids, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in pids} - pids
        pids |= more
        grown = bool(more)
    return pids


def cpu_micros(root):
    """User and system time used so far by a process tree, all threads, in microseconds."""
    total = 0
    for pid in tree(root):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total * TICK


def memory_mb(root, field="VmRSS"):
    """Resident memory of a process tree in MB; with `RssAnon` without what is mapped of files."""
    total = 0
    for pid in tree(root):
        try:
            with open(f"/proc/{pid}/status") as status:
                found = re.search(rf"{field}:\s+(\d+)", status.read())
        except OSError:
            continue
        total += int(found.group(1)) if found else 0
    return total / 1024


class MemoryGroup:
    """A cgroup of its own for a process, so that its memory is counted as Kubernetes counts that of a container."""

    def __init__(self, name):
        unified = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
        root = "/sys/fs/cgroup" if unified else "/sys/fs/cgroup/memory"
        self.path = os.path.join(root, f"postern-bench-{os.getpid()}-{name}")
        self.used, self.inactive = (("memory.current", "inactive_file") if unified
                                    else ("memory.usage_in_bytes", "total_inactive_file"))
        try:
            os.mkdir(self.path)
            self.works = os.path.exists(os.path.join(self.path, self.used))
        except OSError:
            self.works = False

    def entered(self, command):
        """The command, that begins by entering the group."""
        if not self.works:
            return command
        return ["sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh", *command]

    def working_set_mb(self):
        """What is used without file pages that nobody has looked at twice: `container_memory_working_set_bytes`."""
        with open(os.path.join(self.path, self.used)) as file:
            used = int(file.read())
        with open(os.path.join(self.path, "memory.stat")) as file:
            inactive = int(re.search(rf"^{self.inactive} (\d+)", file.read(), re.MULTILINE).group(1))
        return (used - inactive) / 2**20

    def remove(self):
        if self.works:
            os.rmdir(self.path)
            self.works = False


def wrk(cores, url, seconds, connections=64, headers=(), script=None, env=None):
    """Runs wrk; gives the number of good answers."""
    command = ["wrk", "-t", str(len(cores)), "-c", str(connections), "-d", f"{seconds}s"]
    for header in headers:
        command += ["-H", header]
    if script:
        command += ["-s", script]
    result = subprocess.run(
        pinned(cores, [*command, url]), capture_output=True, text=True, env={**os.environ, **(env or {})}
    )
    count = re.search(r"(\d+) requests in", result.stdout)
    if not count:
        raise SystemExit(f"wrk failed: {result.stdout}{result.stderr}")
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", result.stdout)
    errors = re.search(r"Socket errors: (.*)", result.stdout)
    if bad or (errors and not errors.group(1).endswith("timeout 0")) or int(count.group(1)) == 0:
        raise SystemExit(f"wrk {url}: not every request went well:\n{result.stdout}")
    return int(count.group(1))


def own_load(program, cores, *args):
    """Runs our own client (tests/examples/load.rs); gives its JSON."""
    command = pinned(cores, [program, *map(str, args)])
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {result.stderr}")
    return json.loads(result.stdout)


def cost(subject, load):
    """CPU microseconds per unit of `load`, a function that gives how many units it made."""
    before = cpu_micros(subject.pid)
    count = load()
    return (cpu_micros(subject.pid) - before) / count


def wait_until(check, limit=60, what="the subject is ready"):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if check():
            return
        time.sleep(0.02)
    raise SystemExit(f"not within {limit} s: {what}")
