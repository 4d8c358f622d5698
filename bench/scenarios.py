"""The scenarios of `make bench`: each gives rows for the one table at the end."""

import os
import statistics
import threading
import time

from measure import cost, cpu_micros, memory_mb, own_load, wait_until, wrk
from subjects import (Authority, Certificates, Envoy, Haproxy, Nginx, NginxPair, Postern, Sidecar, Signer, get, identity,
                      upstream_object, write)

KEY = "bench-consumer-key"
FIVE_PLUGINS = {
    "key-auth": {},
    "limit-count": {"count": 1_000_000_000, "time_window": 3600, "key": "remote_addr", "policy": "local"},
    "proxy-rewrite": {"headers": {"set": {"X-Bench": "$remote_addr"}}},
    "request-id": {},
    "prometheus": {},
}
SIGNERS = ["signer-1", "signer-2"]
# A random one of $ROUTES routes for each request.
ROUTE_SCRIPT = """
local routes = tonumber(os.getenv("ROUTES"))
math.randomseed(7)
request = function()
    return wrk.format("GET", "/service-" .. math.random(0, routes - 1) .. "/items")
end
"""


class Row:
    """One figure with a value for each round, and the goal it is held against."""

    def __init__(self, scenario, figure, values, goal=None, unit=""):
        self.scenario, self.figure, self.values, self.goal, self.unit = scenario, figure, values, goal, unit

    @property
    def median(self):
        return statistics.median(self.values)

    @property
    def verdict(self):
        if self.goal is None:
            return ""
        return "met" if self.median <= self.goal else "MISSED"


class Bench:
    """What the scenarios share: options, cores, upstream, certificates, and the subjects that run."""

    def __init__(self, options, cores, folder, upstream, certificates, say):
        self.options, self.cores, self.folder = options, cores, folder
        self.upstream, self.certificates, self.say = upstream, certificates, say
        self.running = {}

    def subject(self, name):
        """A subject by name; started at its first use and then left running, idle while others are measured."""
        if name not in self.running:
            self.running[name] = self.start(name)
        return self.running[name]

    def start(self, name):
        common = (self.folder, self.cores.proxy, self.upstream.http, self.certificates)
        match name:
            case "nginx":
                return Nginx(*common)
            case "haproxy":
                return Haproxy(*common)
            case "envoy":
                return Envoy(*common, self.options.envoy)
            case "postern":
                return self.postern(name, {"routes": [self.route("all", "/*")], "ssls": [self.ssl()]})
            case "plugins":
                consumer = {"username": "bench", "plugins": {"key-auth": {"key": KEY}}}
                route = {**self.route("all", "/*"), "plugins": FIVE_PLUGINS}
                resources = {"routes": [route], "consumers": [consumer]}
                return self.postern(name, resources, headers={"apikey": KEY})
            case "signer-1" | "signer-2":
                return Signer(name, self.folder, self.cores.upstream, self.options.postern, self.certificates)
            case "remote key":
                nodes = [f"localhost:{self.subject(node).https}" for node in SIGNERS]
                files = {"cert_file": self.certificates.cert, "key_file": self.certificates.key,
                         "ca_file": self.certificates.ca}
                resources = {"routes": [self.route("all", "/*")], "ssls": [{**self.ssl(), "key": "signer://main/bench"}]}
                return self.postern(name, resources, own={"signers": [{"name": "main", "nodes": nodes, **files}]})

    def postern(self, name, resources=None, cores=None, **ready):
        return Postern(name, self.folder, cores or self.cores.proxy, self.options.postern, resources, **ready)

    def route(self, id, uri):
        return {"id": id, "uri": uri, "upstream": upstream_object(self.upstream.http)}

    def ssl(self):
        with open(self.certificates.cert) as cert, open(self.certificates.key) as key:
            return {"id": "bench", "snis": ["localhost"], "cert": cert.read(), "key": key.read()}

    def rounds(self, scenario, names, load):
        """CPU microseconds per unit of each subject in each round: A B C, A B C, ..."""
        names = [name for name in names if name not in self.options.without]
        costs = {name: [] for name in names}
        for number in range(self.options.rounds + 1):
            for name in names:
                subject = self.subject(name)
                micros = cost(subject, lambda: load(subject))
                # Round 0 fills caches, pools and the branch predictor.
                if number > 0:
                    costs[name].append(micros)
                    self.say(f"{scenario}: round {number}: {name} {micros:.1f} µs")
        return costs

    def wrk(self, subject, url, **more):
        return wrk(self.cores.load, url.format(http=subject.http, https=subject.https), self.options.seconds, **more)

    def rate(self, port, path, seconds):
        """1,000 requests a second on 32 connections: their latencies in microseconds."""
        result = own_load(self.options.load, self.cores.load, "rate", f"127.0.0.1:{port}", path, 32, 1000, seconds)
        if result["bad"] or result["died"]:
            raise SystemExit(f"requests failed: {result}")
        return result

    def compare(self, scenario, names, load, goals, reference="nginx"):
        """One row for the cost of each subject, one for each ratio: to the reference, and those with a goal."""
        costs = self.rounds(scenario, names, load)
        rows = [Row(scenario, f"{name}", values, unit=" µs") for name, values in costs.items()]
        pairs = [(name, reference) for name in costs if name != reference]
        pairs += [pair for pair in goals if pair not in pairs and pair[0] in costs]
        for one, other in pairs:
            if other in costs:
                ratios = [mine / theirs for mine, theirs in zip(costs[one], costs[other])]
                rows.append(Row(scenario, f"{one} / {other}", ratios, goals.get((one, other))))
        return rows


def http1(bench):
    """HTTP/1.1 keep-alive, GET 1 KB, 64 connections."""
    return bench.compare(
        "HTTP/1 keep-alive",
        ["nginx", "haproxy", "envoy", "postern"],
        lambda subject: bench.wrk(subject, "http://localhost:{http}/"),
        {("postern", "nginx"): 1.05, ("postern", "envoy"): 0.35},
    )


def tls(bench):
    """The same over TLS 1.3."""
    return bench.compare(
        "TLS keep-alive",
        ["nginx", "haproxy", "envoy", "postern"],
        lambda subject: bench.wrk(subject, "https://localhost:{https}/"),
        {("postern", "nginx"): 0.85},
    )


def handshake(bench):
    """Full TLS 1.3 handshakes (ECDSA P-256, X25519), without resumption and without a request."""

    def load(subject):
        result = own_load(bench.options.load, bench.cores.load[:1], "handshakes", f"127.0.0.1:{subject.https}",
                          bench.certificates.ca, "localhost", 16, bench.options.seconds)
        if result["bad"]:
            raise SystemExit(f"{subject.name}: {result['bad']} handshakes failed")
        return result["count"]

    return bench.compare("full TLS handshake", ["nginx", "haproxy", "envoy", "postern"], load,
                         {("postern", "nginx"): 0.65})


def mutual(bench):
    """Full TLS 1.3 handshakes with certificates of both sides: nginx, and a sidecar that also checks the identity."""
    folder = os.path.join(bench.folder, "mutual")
    os.makedirs(folder)
    os.chmod(folder, 0o755)
    pair = Certificates(folder, identity("mutual"))
    bench.running["nginx, mutual"] = Nginx(bench.folder, bench.cores.proxy, bench.upstream.http, pair, "mutual-nginx", True)
    files = {"cert": pair.cert, "key": pair.key, "trust": pair.ca}
    sidecar = bench.running["sidecar"] = Sidecar("mutual", bench.folder, bench.cores.proxy, bench.options.postern,
                                                 {"files": files}, forward=bench.upstream.http)
    sidecar.https = sidecar.inbound
    wait_until(lambda: get(sidecar.admin, "/status/ready") == 200, what="the sidecar is ready")

    def load(subject):
        result = own_load(bench.options.load, bench.cores.load[:1], "mutual", f"127.0.0.1:{subject.https}", pair.ca,
                          "localhost", 16, bench.options.seconds, pair.cert, pair.key,
                          "postern-h2" if subject is sidecar else "http/1.1")
        if result["bad"]:
            raise SystemExit(f"{subject.name}: {result['bad']} handshakes failed")
        return result["count"]

    return bench.compare("mutual handshake", ["nginx, mutual", "sidecar"], load, {("sidecar", "nginx, mutual"): 1},
                         reference="nginx, mutual")


def signer(bench):
    """Full TLS 1.3 handshakes with the key in the gateway, and with the key at two signers that share a core."""
    rates, signing = {"postern": [], "remote key": []}, []

    def load(subject):
        before = sum(cpu_micros(bench.subject(node).pid) for node in SIGNERS)
        result = own_load(bench.options.load, bench.cores.load[:1], "handshakes", f"127.0.0.1:{subject.https}",
                          bench.certificates.ca, "localhost", 16, bench.options.seconds)
        if result["bad"]:
            raise SystemExit(f"{subject.name}: {result['bad']} handshakes failed")
        rates[subject.name].append(result["count"] / bench.options.seconds)
        if subject.name == "remote key":
            spent = sum(cpu_micros(bench.subject(node).pid) for node in SIGNERS) - before
            signing.append(spent / result["count"])
        return result["count"]

    title = "handshakes, key at signers"
    rows = bench.compare(title, ["postern", "remote key"], load, {}, reference="postern")
    rows += [Row(title, f"{name}, handshakes/s", values[1:]) for name, values in rates.items()]
    return [*rows, Row(title, "signers, both together", signing[1:], unit=" µs")]


def plugins(bench):
    """key-auth, limit-count, proxy-rewrite, request-id and prometheus, against nginx without anything."""
    return bench.compare(
        "five plugins",
        ["nginx", "plugins"],
        lambda subject: bench.wrk(subject, "http://localhost:{http}/", headers=[f"apikey: {KEY}"]),
        {("plugins", "nginx"): 1.25},
    )


def service_route(bench, number):
    return bench.route(f"service-{number}", f"/service-{number}/*")


def fill(bench, subject, count):
    """Writes routes by the Admin API, on four connections."""

    def writer(first):
        connection = subject.admin_connection()
        for number in range(first, count, 4):
            connection.put(f"routes/service-{number}", service_route(bench, number))

    writers = [threading.Thread(target=writer, args=(first,)) for first in range(4)]
    begin = time.monotonic()
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    bench.say(f"routes: {count} written by the Admin API in {time.monotonic() - begin:.1f} s")
    last = f"/service-{count - 1}/items"
    wait_until(lambda: get(subject.http, last) == 200, what=f"{last} is served")


def routes(bench):
    """10 against 100,000 routes in the embedded store: cost, memory, one more route, 1,000 more under load."""
    count = bench.options.routes
    script = write(bench.folder, "routes.lua", ROUTE_SCRIPT)
    sizes = {"10 routes": 10, f"{count} routes": count}
    few, many = sizes
    for name, size in sizes.items():
        # The Admin API works on the second core: it is its effect on the worker that is measured.
        subject = bench.running[name] = bench.postern(name.replace(" ", "-"), cores=bench.cores.pair)
        fill(bench, subject, size)
        subject.stop()
        subject.run()
        wait_until(lambda: get(subject.http, f"/service-{size - 1}/items") == 200, what=f"{name} are served again")
    rows = [Row("routes", f"memory with {name}", [memory_mb(bench.running[name].pid)], unit=" MB",
                goal=200 if size > 10 else None) for name, size in sizes.items()]

    def load(subject):
        size = next(size for name, size in sizes.items() if bench.running[name] is subject)
        return bench.wrk(subject, "http://localhost:{http}/", script=script, env={"ROUTES": str(size)})

    rows += bench.compare("routes", list(sizes), load, {(many, few): 1.15}, reference=few)
    subject = bench.running[many]
    admin = subject.admin_connection()
    rows.append(Row("routes", f"one more route visible beside {count}",
                    [one_more(bench, subject, admin, number) for number in range(20)], 50, " ms"))
    rows += added_latency(bench, subject, admin, count)
    return rows


def one_more(bench, subject, admin, number):
    """Milliseconds from sending the PUT to the first request that finds the new route."""
    begin = time.monotonic()
    admin.put(f"routes/more-{number}", bench.route(f"more-{number}", f"/more-{number}"))
    while get(subject.http, f"/more-{number}") != 200:
        if time.monotonic() - begin > 10:
            raise SystemExit("the new route does not become visible")
    return (time.monotonic() - begin) * 1000


def added_latency(bench, subject, admin, count):
    """p99 at 1,000 requests a second: quiet, and while 1,000 routes are added one by one."""
    seconds = max(5, bench.options.seconds)

    def rate():
        return bench.rate(subject.http, "/service-1/items", seconds)

    quiet, busy = [], []
    for turn in range(bench.options.rounds):
        quiet.append(rate()["p99"])
        result = {}
        load = threading.Thread(target=lambda: result.update(rate()))
        load.start()
        for number in range(1000):
            admin.put(f"routes/added-{turn}-{number}", bench.route(f"added-{turn}-{number}", f"/added-{turn}-{number}"))
            time.sleep(seconds / 1200)
        load.join()
        if not result:
            raise SystemExit("requests failed while routes were added")
        busy.append(result["p99"])
        bench.say(f"routes: round {turn + 1}: p99 {quiet[-1]} µs quiet, {busy[-1]} µs while 1,000 are added")
    return [
        Row("routes", f"p99 beside {count}, quiet", quiet, unit=" µs"),
        Row("routes", f"p99 beside {count}, adding 1,000", busy, unit=" µs"),
        Row("routes", "p99 adding / quiet", [one / other for one, other in zip(busy, quiet)], 1.2),
    ]


def start(bench):
    """Seconds from exec to the first proxied answer, with 10,000 routes in the file."""
    resources = {"routes": [service_route(bench, number) for number in range(10_000)]}
    values = []
    for number in range(bench.options.rounds):
        subject = bench.postern("start", resources, path="/service-9999/items")
        values.append(time.monotonic() - subject.started)
        subject.stop()
        bench.say(f"start: round {number + 1}: {values[-1]:.2f} s")
    return [Row("start", "10,000 routes to first answer", values, 1.0, " s")]


def mesh(bench):
    """A pair of sidecars with mTLS beside a pair of nginx: what it adds at 1,000 requests a second, and what it takes."""
    program = bench.options.postern
    authority = bench.running["ca"] = Authority(bench.folder, bench.cores.load, program)
    callee = bench.running["callee"] = Sidecar("callee", bench.folder, bench.cores.upstream, program,
                                               authority.source("callee"), forward=bench.upstream.http)
    caller = bench.running["caller"] = Sidecar("caller", bench.folder, bench.cores.proxy, program,
                                               authority.source("caller"), node=callee.inbound)
    nginx = NginxPair(bench.folder, bench.cores, bench.upstream.http, bench.certificates)
    bench.running |= {"nginx-caller": nginx.caller, "nginx-callee": nginx.callee}
    ours, theirs = {"caller": caller, "callee": callee}, {"caller": nginx.caller, "callee": nginx.callee}
    wait_until(lambda: get(caller.http) == 200, what="a call through both sidecars")
    rows = memory_rows(ours, "idle", 10)
    pairs = {"sidecars": Pair(ours), "nginx": Pair(theirs)}
    seconds = max(5, bench.options.seconds)
    for number in range(bench.options.rounds + 1):
        direct = bench.rate(bench.upstream.http, "/", seconds)
        for name, pair in pairs.items():
            through = pair.rate(bench, direct, seconds, counts=number > 0)
            # Round 0 makes connections.
            if number > 0:
                bench.say(f"mesh: round {number}: {name}: p50 {direct['p50']} to {through['p50']} µs, "
                          f"p99 {direct['p99']} to {through['p99']} µs")
    for name, pair in pairs.items():
        goals = {"p50": 0.3, "p99": 0.8, "cores": 0.1} if name == "sidecars" else {}
        rows += [Row(name, f"{part} that the pair adds at 1,000/s", values, goals.get(part), " ms")
                 for part, values in pair.added.items()]
        rows += [Row(name, f"cores of the {one} at 1,000/s", values, goals.get("cores"))
                 for one, values in pair.cores.items()]
    rows += memory_rows(ours, "under load", 20)
    for number in range(bench.options.rounds + 1):
        for name, pair in pairs.items():
            pair.wrk(bench, counts=number > 0)
    for name, pair in pairs.items():
        for one, values in pair.costs.items():
            rows += [Row(name, f"{one}: a request", values, unit=" µs"),
                     Row(name, f"{one}: requests a second and core", [1_000_000 / value for value in values])]
    return rows


def memory_rows(pair, when, goal):
    """As Kubernetes counts it, and as `ps` does: with pages of the program that are mapped and that all processes share."""
    rows = []
    for name, subject in pair.items():
        if subject.memory.works:
            rows.append(Row("sidecars", f"working set of the {name}, {when}", [subject.memory.working_set_mb()], goal, " MB"))
        rows += [Row("sidecars", f"resident memory of the {name}, {when}", [memory_mb(subject.pid)], unit=" MB"),
                 Row("sidecars", "of that its own, not the program's", [memory_mb(subject.pid, "RssAnon")], unit=" MB")]
    return rows


class Pair:
    """Two proxies on the way of a request, and what they took."""

    def __init__(self, pair):
        self.pair = pair
        self.added = {"p50": [], "p99": []}
        self.cores = {name: [] for name in pair}
        self.costs = {name: [] for name in pair}

    def spent(self):
        return {name: cpu_micros(subject.pid) for name, subject in self.pair.items()}

    def rate(self, bench, direct, seconds, counts):
        """At 1,000 requests a second; `direct` is how it is without the pair."""
        before = self.spent()
        through = bench.rate(self.pair["caller"].http, "/", seconds)
        if counts:
            for name, micros in self.spent().items():
                self.cores[name].append((micros - before[name]) / (seconds * 1_000_000))
            for part, values in self.added.items():
                values.append((through[part] - direct[part]) / 1000)
        return through

    def wrk(self, bench, counts):
        """As many requests as they can."""
        before = self.spent()
        count = bench.wrk(self.pair["caller"], "http://localhost:{http}/")
        if counts:
            for name, micros in self.spent().items():
                self.costs[name].append((micros - before[name]) / count)


SCENARIOS = {"http": http1, "tls": tls, "handshake": handshake, "mutual": mutual, "signer": signer, "plugins": plugins,
             "routes": routes, "start": start, "mesh": mesh}
NEED_POSTERN = {"mutual", "signer", "plugins", "routes", "start", "mesh"}
