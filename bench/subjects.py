"""The proxies that are compared, each with one worker on one core and the same job, and the upstream."""

import atexit
import http.client
import json
import os
import signal
import socket
import subprocess
import time

from measure import MemoryGroup, pinned, wait_until

NGINX = "/usr/sbin/nginx" if os.path.exists("/usr/sbin/nginx") else "nginx"
BODY = "x" * 1024
KEY = "bench-admin-key"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Certificates:
    """An authority and a certificate for `localhost` (ECDSA P-256), made by openssl; with an identity if it is given."""

    def __init__(self, folder, identity=None):
        self.ca, self.cert, self.key = (os.path.join(folder, name) for name in ("ca.pem", "cert.pem", "key.pem"))
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

        def openssl(*args):
            subprocess.run(["openssl", *args], check=True, capture_output=True)

        ca_key, request = os.path.join(folder, "ca.key"), os.path.join(folder, "request.pem")
        openssl("req", "-x509", *key, "-keyout", ca_key, "-out", self.ca, "-subj", "/CN=bench", "-days", "2",
                "-addext", "keyUsage=critical,keyCertSign,cRLSign")
        openssl("req", *key, "-keyout", self.key, "-out", request, "-subj", "/CN=localhost")
        names = "DNS:localhost" + (f",URI:{identity}" if identity else "")
        extensions = write(folder, "extensions", f"subjectAltName={names}\nbasicConstraints=CA:FALSE\n"
                           "keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n")
        openssl("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", ca_key, "-out", self.cert,
                "-days", "2", "-extfile", extensions)


class Subject:
    """A running process in a folder of its own."""

    def __init__(self, name, folder, cores):
        self.name = name
        self.folder = os.path.join(folder, name)
        os.makedirs(self.folder, exist_ok=True)
        self.cores = cores
        self.http, self.https = free_port(), free_port()
        self.process = None

    @property
    def pid(self):
        return self.process.pid

    def launch(self, command):
        log = open(os.path.join(self.folder, "output"), "ab")
        self.process = subprocess.Popen(
            pinned(self.cores, command), cwd=self.folder, stdout=log, stderr=log, start_new_session=True
        )
        atexit.register(self.stop)

    def wait(self, path="/", headers=None):
        def ready():
            if self.process.poll() is not None:
                with open(os.path.join(self.folder, "output")) as log:
                    raise SystemExit(f"{self.name} ended:\n{log.read()[-4000:]}")
            return get(self.http, path, headers) == 200

        wait_until(ready, what=f"{self.name} answers")

    def stop(self):
        if self.process and self.process.poll() is None:
            # The process group is ours alone: the session was started for it.
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def get(port, path="/", headers=None):
    """The status of a GET on a connection of its own; 0 when there is no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path, headers=headers or {})
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def write(folder, name, text):
    path = os.path.join(folder, name)
    with open(path, "w") as file:
        file.write(text)
    return path


def nginx_config(http):
    return f"""
        worker_processes 1; daemon off; pid nginx.pid; error_log stderr crit;
        events {{ worker_connections 8192; }}
        http {{
            access_log off; keepalive_requests 1000000000; keepalive_timeout 3600s;
            client_body_temp_path temp-body; proxy_temp_path temp-proxy; fastcgi_temp_path temp-fastcgi;
            uwsgi_temp_path temp-uwsgi; scgi_temp_path temp-scgi;
            {http}
        }}
    """


class Upstream(Subject):
    """nginx that answers 1 KB to everything."""

    def __init__(self, folder, cores):
        super().__init__("upstream", folder, cores)
        server = f'server {{ listen 127.0.0.1:{self.http}; location / {{ return 200 "{BODY}"; }} }}'
        write(self.folder, "nginx.conf", nginx_config(server))
        self.launch([NGINX, "-p", self.folder, "-c", "nginx.conf", "-e", "stderr"])
        self.wait()


class Nginx(Subject):
    def __init__(self, folder, cores, upstream, certificates, name="nginx", mutual=False):
        super().__init__(name, folder, cores)
        clients = f"ssl_client_certificate {certificates.ca}; ssl_verify_client on;" if mutual else ""
        location = 'location / { proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection ""; }'
        write(self.folder, "nginx.conf", nginx_config(f"""
            upstream up {{ server 127.0.0.1:{upstream}; keepalive 320; keepalive_requests 1000000000; }}
            ssl_certificate {certificates.cert}; ssl_certificate_key {certificates.key};
            ssl_session_tickets off; ssl_session_cache off; ssl_protocols TLSv1.2 TLSv1.3; {clients}
            server {{ listen 127.0.0.1:{self.http}; {location} }}
            server {{ listen 127.0.0.1:{self.https} ssl; {location} }}
        """))
        self.launch([NGINX, "-p", self.folder, "-c", "nginx.conf", "-e", "stderr"])
        self.wait()


class NginxPair:
    """Two of nginx with mTLS between them, as a pair of sidecars is: plain in, plain out."""

    def __init__(self, folder, cores, upstream, certificates):
        caller, callee = Subject("nginx-caller", folder, cores.proxy), Subject("nginx-callee", folder, cores.upstream)
        tls = f"{certificates.cert}; proxy_ssl_certificate_key {certificates.key}"
        pool = "keepalive 320; keepalive_requests 1000000000;"
        headers = 'proxy_http_version 1.1; proxy_set_header Connection "";'
        write(caller.folder, "nginx.conf", nginx_config(f"""
            upstream up {{ server 127.0.0.1:{callee.https}; {pool} }}
            proxy_ssl_certificate {tls}; proxy_ssl_protocols TLSv1.3; proxy_ssl_session_reuse off;
            proxy_ssl_verify on; proxy_ssl_trusted_certificate {certificates.ca}; proxy_ssl_name localhost;
            server {{ listen 127.0.0.1:{caller.http}; location / {{ proxy_pass https://up; {headers} }} }}
        """))
        write(callee.folder, "nginx.conf", nginx_config(f"""
            upstream up {{ server 127.0.0.1:{upstream}; {pool} }}
            ssl_certificate {certificates.cert}; ssl_certificate_key {certificates.key}; ssl_protocols TLSv1.3;
            ssl_client_certificate {certificates.ca}; ssl_verify_client on; ssl_session_tickets off; ssl_session_cache off;
            server {{ listen 127.0.0.1:{callee.https} ssl; location / {{ proxy_pass http://up; {headers} }} }}
        """))
        for one in callee, caller:
            one.launch([NGINX, "-p", one.folder, "-c", "nginx.conf", "-e", "stderr"])
        caller.wait()
        self.caller, self.callee = caller, callee


class Haproxy(Subject):
    def __init__(self, folder, cores, upstream, certificates):
        super().__init__("haproxy", folder, cores)
        with open(certificates.cert) as cert, open(certificates.key) as key:
            pem = write(self.folder, "both.pem", cert.read() + key.read())
        path = write(self.folder, "haproxy.cfg", f"""
global
    nbthread 1
    maxconn 8192
    tune.ssl.cachesize 0
defaults
    mode http
    timeout connect 5s
    timeout client 3600s
    timeout server 3600s
    http-reuse always
frontend in
    bind 127.0.0.1:{self.http}
    bind 127.0.0.1:{self.https} ssl crt {pem} no-tls-tickets
    default_backend out
backend out
    server one 127.0.0.1:{upstream}
""")
        self.launch(["haproxy", "-db", "-f", path])
        self.wait()


class Envoy(Subject):
    def __init__(self, folder, cores, upstream, certificates, program):
        super().__init__("envoy", folder, cores)
        path = write(self.folder, "envoy.json", json.dumps(envoy_config(self, upstream, certificates)))
        self.launch([program, "-c", path, "--concurrency", "1", "--disable-hot-restart", "-l", "error"])
        self.wait()


def envoy_config(subject, upstream, certificates):
    def address(port):
        return {"socket_address": {"address": "127.0.0.1", "port_value": port}}

    def kind(name):
        return f"type.googleapis.com/{name}"

    def listener(port, tls):
        manager = {
            "@type": kind("envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"),
            "stat_prefix": "in",
            "generate_request_id": False,
            "route_config": {"virtual_hosts": [
                {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "up"}}]}
            ]},
            "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
                "@type": kind("envoy.extensions.filters.http.router.v3.Router")}}],
        }
        chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        if tls:
            files = {"certificate_chain": {"filename": certificates.cert},
                     "private_key": {"filename": certificates.key}}
            chain["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": {
                "@type": kind("envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"),
                "disable_stateless_session_resumption": True,
                "common_tls_context": {"tls_certificates": [files]}}}
        return {"name": f"in-{port}", "address": address(port), "filter_chains": [chain]}

    return {"static_resources": {
        "listeners": [listener(subject.http, False), listener(subject.https, True)],
        "clusters": [{"name": "up", "type": "STATIC", "connect_timeout": "5s", "load_assignment": {
            "cluster_name": "up",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(upstream)}}]}]}}]}}


def upstream_object(port):
    return {"type": "roundrobin", "nodes": {f"127.0.0.1:{port}": 1},
            "keepalive_pool": {"size": 320, "idle_timeout": 60, "requests": 1_000_000_000}}


class Postern(Subject):
    """`postern edge`; resources from a file, or by the Admin API into the embedded store."""

    def __init__(self, name, folder, cores, program, resources=None, path="/", headers=None, own=None):
        super().__init__(name, folder, cores)
        self.program = program
        self.admin, self.control, self.status = free_port(), free_port(), free_port()
        deployment = {"role": "data_plane", "role_data_plane": {"config_provider": "yaml"}}
        if resources is None:
            deployment = {"role": "traditional", "admin": {
                "admin_key": [{"name": "admin", "key": KEY, "role": "admin"}],
                "admin_listen": {"ip": "127.0.0.1", "port": self.admin}}}
        else:
            write(self.folder, "apisix.yaml", json.dumps(resources) + "\n#END\n")
        config = {
            "apisix": {
                "node_listen": [{"ip": "127.0.0.1", "port": self.http}],
                "ssl": {"enable": True, "listen": [{"ip": "127.0.0.1", "port": self.https}]},
                "control": {"ip": "127.0.0.1", "port": self.control},
                "status": {"ip": "127.0.0.1", "port": self.status},
            },
            "plugin_attr": {"prometheus": {"export_addr": {"ip": "127.0.0.1", "port": free_port()}}},
            "nginx_config": {"worker_processes": 1, "http": {"enable_access_log": False}},
            "deployment": deployment,
            "postern": {"data_dir": os.path.join(self.folder, "data"), **(own or {})},
        }
        self.config = write(self.folder, "config.yaml", json.dumps(config))
        self.started = time.monotonic()
        self.run()
        if resources is None:
            wait_until(self.is_ready, what=f"{self.name} is ready")
        else:
            self.wait(path, headers)

    def run(self):
        self.launch([self.program, "edge", "-c", self.config])

    def is_ready(self):
        return get(self.status, "/status/ready") == 200

    def admin_connection(self):
        return AdminConnection(self.admin)


class Signer(Subject):
    """`postern signer` with the key of the certificate, for gateways that show this certificate."""

    def __init__(self, name, folder, cores, program, certificates):
        super().__init__(name, folder, cores)
        keys = os.path.join(self.folder, "keys")
        os.makedirs(keys, exist_ok=True)
        with open(certificates.key) as key:
            os.chmod(write(keys, "bench.pem", key.read()), 0o600)
        config = {
            "listen": f"127.0.0.1:{self.https}",
            "status": f"127.0.0.1:{self.http}",
            "tls": {"cert_file": certificates.cert, "key_file": certificates.key, "client_ca_file": certificates.ca},
            "clients": [{"name": "localhost", "keys": ["bench"]}],
            "limits": {"signatures_per_second": 1_000_000},
        }
        self.launch([program, "signer", "run", "-c", write(self.folder, "signer.yaml", json.dumps(config))])
        self.wait("/readyz")


class AdminConnection:
    """One keep-alive connection to the Admin API."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def put(self, path, value):
        headers = {"X-API-KEY": KEY, "Content-Type": "application/json"}
        self.connection.request("PUT", f"/apisix/admin/{path}", json.dumps(value), headers)
        answer = self.connection.getresponse()
        body = answer.read()
        if answer.status not in (200, 201):
            raise SystemExit(f"PUT {path}: {answer.status} {body[:500]!r}")


def identity(service):
    return f"spiffe://mesh.local/ns/default/sa/{service}"


class Authority(Subject):
    """`postern ca run`, from which sidecars get their certificates."""

    def __init__(self, folder, cores, program):
        super().__init__("ca", folder, cores)
        self.program, self.address = program, f"127.0.0.1:{free_port()}"
        settings = {"listen": self.address, "status": f"127.0.0.1:{self.http}", "data_dir": "data"}
        self.config = write(self.folder, "ca.yaml", json.dumps(settings))
        self.launch([program, "ca", "run", "-c", self.config])
        self.wait("/readyz")

    def source(self, service):
        """`ca` of a sidecar of this service."""
        token = subprocess.run(
            [self.program, "ca", "token", "create", "-c", self.config, "--identity", identity(service), "--uses", "99"],
            check=True, capture_output=True, text=True,
        ).stdout
        return {"address": self.address, "pin_file": os.path.join(self.folder, "data", "pin"),
                "token_file": write(self.folder, f"{service}.token", token)}


class Sidecar(Subject):
    """`postern sidecar` of a service that is called (`forward`), or that calls another one (`node`, by `http`)."""

    def __init__(self, name, folder, cores, program, source, forward=None, node=None):
        super().__init__(name, folder, cores)
        self.inbound, self.admin, self.memory = free_port(), free_port(), MemoryGroup(name)
        config = {"trust_domain": "mesh.local", "ca": source, "workload": {"service": name},
                  "admin": {"listen": f"127.0.0.1:{self.admin}"}, "drain": {"propagation": 0, "grace": 1}}
        if forward:
            config["inbound"] = {"ports": [
                {"listen": f"127.0.0.1:{self.inbound}", "forward": f"127.0.0.1:{forward}"}]}
        if node:
            config["services"] = [{"name": "callee", "identities": [identity("callee")],
                                   "upstream": {"type": "roundrobin", "nodes": {f"127.0.0.1:{node}": 1}}}]
            config["outbound"] = {"listeners": [{"listen": f"127.0.0.1:{self.http}", "service": "callee"}]}
        path = write(self.folder, "sidecar.yaml", json.dumps(config))
        self.launch(self.memory.entered([program, "sidecar", "-c", path]))
        wait_until(lambda: get(self.admin, "/status/ready") == 200, what=f"the sidecar {name} is ready")

    def stop(self):
        super().stop()
        self.memory.remove()
