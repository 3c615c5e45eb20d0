"""TLS on every link: authentication, errors, and certificates replaced under load."""

import datetime as dt
import hashlib
import shutil
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from redis import Redis
from tolhouse import Client, ClientCredentials
from tolhouse.certs import ensure_authority, issue
from tolhouse.errors import (
    InvalidArgumentError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from tolhouse.files import ReloadingFiles, replace_file
from tolhouse.logs import is_loopback
from tolhouse.net import auth
from tolhouse.net.auth import ServerCredentials
from tolhouse.net.channel import dial
from tolhouse.store.base import open_store, require_private
from tolhouse.testing import (
    build_table,
    local_cluster,
    process,
    redis_binary,
    redis_server,
    wait_until,
)

from tests.commands import LOCAL, tolhouse


def pair(folder: Path, name: str = "service", kind: str = "") -> tuple[str, ...]:
    files = f"{folder}/{name}.pem", f"{folder}/{name}.key"
    return (f"--tls-{kind}cert", files[0], f"--tls-{kind}key", files[1])


def serving(folder: Path, name: str = "service") -> tuple[str, ...]:
    """Return options of a listener that requires certificates of the authority in `folder`."""
    return (*pair(folder, name), "--tls-client-ca", f"{folder}/ca.pem")


def calling(folder: Path) -> tuple[str, ...]:
    return ("--tls-ca", f"{folder}/ca.pem", *pair(folder, "client", "client-"))


def access(folder: Path) -> ClientCredentials:
    return ClientCredentials(f"{folder}/ca.pem", f"{folder}/client.pem", f"{folder}/client.key")


def context(folder: Path, client: bool = True) -> ssl.SSLContext:
    """Return the TLS context of an HTTPS client, with or without a certificate."""
    made = ssl.create_default_context(cafile=f"{folder}/ca.pem")
    for _ in range(100 if client else 0):
        try:
            made.load_cert_chain(f"{folder}/client.pem", f"{folder}/client.key")
            break
        except ssl.SSLError:  # certificate and key are being replaced, one after the other
            time.sleep(0.01)
    return made


def refusal(*arguments: str) -> str:
    """Return the stderr of a failed command."""
    return tolhouse("", *arguments, code=1).stderr


def secured(checkpoint: Path, store: str, folder: Path, lookup: str = "", worker: str = "") -> Any:
    """Start a cluster with mutual TLS from the files in `folder`, and with more options."""
    both = (*serving(folder), *calling(folder))
    return local_cluster(
        checkpoint,
        store,
        lookup_options=(*serving(folder), *lookup.split()),
        worker_options=(*both, *worker.split()),
        gateway_options=both,
        tls=context(folder),
    )


def tls_redis_or_skip() -> None:
    try:
        redis_binary(tls=True)
    except NotFoundError as error:
        pytest.skip(str(error))


# all links together


def test_every_link_speaks_mutual_tls(checkpoint: Path, pki: Path, tmp_path: Path) -> None:
    """With TLS on every link and a Redis ACL user, only clients with a certificate get answers."""
    tls_redis_or_skip()
    password = tmp_path / "password"
    password.write_text("a long password\n", encoding="utf-8")
    acl_file = tmp_path / "users.acl"
    digest = hashlib.sha256(b"a long password").hexdigest()
    acl_file.write_text(
        f"user default off\nuser tolhouse on #{digest} ~tolhouse:* &* +@all\n", encoding="utf-8"
    )
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server("--aclfile", str(acl_file), tls=pki))
        files = (
            f"ssl_ca_certs={pki}/ca.pem&ssl_certfile={pki}/client.pem&ssl_keyfile={pki}/client.key"
        )
        url = f"{redis.replace('//', '//tolhouse@127.0.0.1:1,')}?password_file={password}&{files}"
        build_table(checkpoint, url)
        lookup, worker, gateway = stack.enter_context(secured(checkpoint, url, pki)).processes
        with httpx.Client(verify=context(pki)) as http:
            body = {"prompt": "def add", "max_tokens": 4, "ignore_eos": True}
            answer = http.post(f"https://{gateway.address}/v1/completions", json=body)
            metrics = [http.get(f"https://{p.ready['metrics']}/metrics") for p in (lookup, worker)]
        assert (200, 4) == (answer.status_code, answer.json()["usage"]["completion_tokens"])
        assert all("tolhouse_" in told.text for told in metrics)
        for address in (gateway.address, lookup.ready["metrics"], worker.ready["metrics"]):
            for stranger in ({"verify": context(pki, client=False)}, {"verify": False}):
                with httpx.Client(**stranger) as http, pytest.raises(httpx.TransportError):
                    http.get(f"https://{address}/metrics")
            with pytest.raises(httpx.TransportError):
                httpx.get(f"http://{address}/metrics")
        for peer in (lookup, worker):
            for stranger in (ClientCredentials(f"{pki}/ca.pem"), ClientCredentials()):
                with (
                    Client(peer.address, 3, credentials=stranger) as client,
                    pytest.raises(UnavailableError, match="require TLS or a client certificate"),
                ):
                    client.tables()
        assert "a long password" not in "".join(
            p.log.read_text(encoding="utf-8") for p in (lookup, worker, gateway)
        )


def test_a_cluster_speaks_tls(checkpoint: Path, pki: Path) -> None:
    """Connections to the nodes of a Redis Cluster use TLS too."""
    tls_redis_or_skip()
    files = {
        "ssl_ca_certs": f"{pki}/ca.pem",
        "ssl_certfile": f"{pki}/client.pem",
        "ssl_keyfile": f"{pki}/client.key",
    }
    with redis_server("--cluster-enabled", "yes", tls=pki) as url:
        with closing(Redis.from_url(url, **files)) as redis:
            redis.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            wait_until(lambda: redis.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        full = f"{url}?{'&'.join(f'{k}={v}' for k, v in files.items())}"
        ref = build_table(checkpoint, full)
        with closing(open_store(full)) as store:
            assert [ref] == store.refs()


# errors


@pytest.fixture(scope="module")
def bad(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the folder with defective certificates added."""
    folder = tmp_path_factory.mktemp("bad") / "pki"
    shutil.copytree(pki, folder)
    local = ["localhost", "127.0.0.1"]
    issue(folder, "expired", local, dt.timedelta(days=-1))
    issue(folder, "elsewhere", ["elsewhere.example"])
    ensure_authority(folder / "other")
    for path in issue(folder / "other", "untrusted", local):
        path.replace(folder / path.name)
    (folder / "not.pem").write_text("a letter\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("expired", "has expired"),
        ("elsewhere", "is for another host name"),
        ("untrusted", "is not signed by a trusted authority"),
    ],
)
def test_a_server_s_bad_certificate_is_an_error(
    name: str, said: str, bad: Path, store: str
) -> None:
    """The client's error states the defect of the server's certificate, and HTTPS fails too."""
    with process("lookup", "--store", store, *LOCAL, *pair(bad, name)) as lookup:
        with (
            Client(lookup.address, 3, credentials=access(bad)) as client,
            pytest.raises(UnavailableError, match=f"its TLS certificate {said}"),
        ):
            client.tables()
        url = f"https://{lookup.ready['metrics']}/metrics"
        with pytest.raises(OSError, match="certificate verify failed"):
            urllib.request.urlopen(url, timeout=5, context=context(bad))


@pytest.mark.parametrize("name", ["expired", "untrusted"])
def test_a_client_s_bad_certificate_is_refused(name: str, bad: Path, store: str) -> None:
    """A service refuses an expired client certificate and one of another authority."""
    with process("lookup", "--store", store, *LOCAL, *serving(bad)) as lookup:
        shown = ClientCredentials(f"{bad}/ca.pem", f"{bad}/{name}.pem", f"{bad}/{name}.key")
        with (
            Client(lookup.address, 3, credentials=shown) as client,
            pytest.raises(UnavailableError, match="require TLS or a client certificate"),
        ):
            client.tables()
        with Client(lookup.address, 3, credentials=access(bad)) as client:
            assert 1 == len(client.tables())


def test_a_service_without_tls_is_an_error(pki: Path, store: str) -> None:
    """The error of a client with TLS states that the service has no TLS."""
    with process("lookup", "--store", store, *LOCAL) as lookup:
        with (
            Client(lookup.address, 3, credentials=access(pki)) as client,
            pytest.raises(UnavailableError, match="does not speak TLS"),
        ):
            client.tables()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--tls-cert {0}/service.pem", "its certificate; only the certificate is given"),
        ("--tls-key {0}/service.key", "its certificate; only the key is given"),
        ("--tls-cert {0}/service.pem --tls-key {0}/client.key", "client.key does not belong to"),
        ("--tls-cert {0}/not.pem --tls-key {0}/service.key", "is not a PEM certificate"),
        ("--tls-cert {0}/gone.pem --tls-key {0}/service.key", "gone.pem cannot be read: No such"),
        ("--tls-cert {0}/service.pem --tls-key {0}", "the TLS key {0} cannot be read: Is a dir"),
        (
            "--tls-cert {0}/service.pem --tls-key {0}/service.key --tls-client-ca {0}/not.pem",
            "not.pem has no PEM certificate",
        ),
        ("--tls-client-ca {0}/ca.pem", "--tls-client-ca needs --tls-cert and --tls-key"),
        ("--token-file {0}/missing", "the token file {0}/missing cannot be read"),
        ("--token-file {0}/not.pem", "must hold one token per line, each of at least 16"),
    ],
)
def test_bad_files_are_refused_at_start(options: str, said: str, bad: Path, store: str) -> None:
    """The error at start names the file and its defect."""
    filled = options.format(bad).split()
    assert said.format(bad) in refusal("lookup", "--store", store, *LOCAL, *filled)


# plaintext


def test_only_loopback_counts_as_this_machine() -> None:
    """Only loopback addresses and localhost count as this machine."""
    local = "127.0.0.1", "localhost", "[::1]", "127.9.9.9"
    other = "0.0.0.0", "[::]", "10.0.0.1", "lookup-1", "localhost.example"
    assert [*local] == [host for host in (*local, *other) if is_loopback(f"{host}:1")]


def test_plaintext_between_machines_is_refused(checkpoint: Path, store: str) -> None:
    """Plaintext to or from another machine is refused on each kind of port, with a hint."""
    said = "or --insecure if the network is trusted"
    for command in (("lookup", "--store", store), ("gateway", str(checkpoint))):
        assert said in refusal(*command, "--listen", "0.0.0.0:0")
    assert said in refusal("lookup", "--store", store, *LOCAL, "--metrics-listen", "0.0.0.0:0")
    assert said in refusal("gateway", str(checkpoint), *LOCAL, "--workers", "worker-7:50052")
    assert said in refusal("worker", str(checkpoint), *LOCAL, "--rows", "lookup-1:50051")
    assert said in refusal("fetch", "t", "1", "--rows", "lookup-1:50051")
    for command in (("lookup",), ("tables", "list"), ("build", str(checkpoint))):
        assert said in refusal(*command, "--store", "redis://user:secret@redis:6379")
    with pytest.raises(InvalidArgumentError, match="plaintext"):
        Client("lookup-1:50051")
    Client("lookup-1:50051", credentials=ClientCredentials(insecure=True)).close()
    with process("lookup", "--store", store, "--listen", "0.0.0.0:0", "--insecure") as lookup:
        with Client(f"127.0.0.1:{lookup.address.rpartition(':')[2]}") as client:
            assert 1 == len(client.tables())


def test_redis_certificates_must_be_checked() -> None:
    """rediss:// without certificate checks counts as plaintext."""
    local = "redis://127.0.0.1:6379 redis://localhost rediss://127.0.0.1:1?ssl_cert_reqs=none"
    for url in ("rediss://redis:6379", *local.split(), "file://x"):
        assert url == require_private(url, insecure=False)
    unchecked = "rediss://redis:6379?ssl_cert_reqs=none rediss://redis?ssl_check_hostname=False"
    for url in ("redis://redis:6379", "redis://127.0.0.1:1,redis:6379", *unchecked.split()):
        with pytest.raises(InvalidArgumentError, match="`insecure`"):
            require_private(url, insecure=False)
        assert url == require_private(url, insecure=True)


@pytest.mark.parametrize("command", ["publish none --store", "worker none --rows"])
def test_a_password_on_the_command_line_causes_a_warning(command: str, redis_url: str) -> None:
    """A password in a URL on the command line causes a warning, and no message shows it."""
    url = redis_url.replace("//", "//:hunter2@")
    said = refusal(*command.split(), url)
    assert "a password on the command line" in said
    assert "hunter2" not in said


# files replaced while in use


def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    """A file is read once per change, and the last valid value stays if a read fails."""
    path = tmp_path / "n"
    path.write_text("1", encoding="utf-8")
    reads: list[int] = []

    def read() -> int:
        try:
            reads.append(int(path.read_text(encoding="utf-8")))
        except ValueError:
            raise InvalidArgumentError("no number") from None
        return reads[-1]

    watched = ReloadingFiles((str(path), ""), read)
    assert (1, 1, [1]) == (watched.get(), watched.get(), [*reads])
    replace_file(path, b"22")
    assert (22, 22, [1, 22]) == (watched.get(), watched.get(), [*reads])
    path.write_text("no", encoding="utf-8")
    assert (22, [1, 22]) == (watched.get(), [*reads])
    path.unlink()
    assert 22 == watched.get()
    path.write_text("333", encoding="utf-8")
    assert 333 == watched.get()


def test_files_that_are_replaced_while_they_are_read_match(
    pki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate and the key belong together although both are replaced between reading one
    and the other."""
    folder = Path(shutil.copytree(pki, tmp_path / "pki"))
    files, read = [str(folder / f"service.{end}") for end in ("pem", "key")], auth.read_file

    def replaced(path: str, what: str) -> bytes:
        data = read(path, what)
        if path == files[0] and data == (pki / "service.pem").read_bytes():
            issue(folder, "service", ["localhost"])
        return data

    monkeypatch.setattr(auth, "read_file", replaced)
    pems = auth.read_pems(*files, "")
    assert [Path(file).read_bytes() for file in files] == [pems.certificate, pems.key]


def test_only_changed_files_are_a_new_configuration(
    pki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handshakes use the certificate that a gRPC server has until a file changes."""
    folder, made = Path(shutil.copytree(pki, tmp_path / "pki")), []
    make = grpc.ssl_server_certificate_configuration

    def counted(*arguments: Any) -> Any:
        made.append(arguments)
        return make(*arguments)

    monkeypatch.setattr(grpc, "ssl_server_certificate_configuration", counted)
    files = (f"{folder}/{name}" for name in ("service.pem", "service.key", "ca.pem"))
    tls, server = ServerCredentials(*files).for_grpc(), grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", tls)
    server.start()
    for count in (1, 1, 1, 2, 2):
        if count > len(made):
            replace_file(folder / "ca.pem", (folder / "ca.pem").read_bytes())
        with dial(f"127.0.0.1:{port}", access(folder)) as channel:
            grpc.channel_ready_future(channel).result(30)
        assert count == len(made)
    server.stop(0).wait()


def test_certificates_and_authority_are_replaced_under_load(
    checkpoint: Path, store: str, tmp_path: Path
) -> None:
    """No request fails while the authority is replaced, and the old one is refused at the end."""
    folder, old, new = tmp_path / "in-use", tmp_path / "old", tmp_path / "new"
    folder.mkdir()
    for authority in (old, new):
        ensure_authority(authority)
        issue(authority, "service", ["localhost", "127.0.0.1"])
        issue(authority, "client", [])

    def use(source: Path, *names: str) -> None:
        for name in names:
            replace_file(folder / name, (source / name).read_bytes())

    use(old, "ca.pem", "service.pem", "service.key", "client.pem", "client.key")
    with ExitStack() as stack:
        cold = "--hot-megabytes 0", "--row-cache-megabytes 0"
        cluster = stack.enter_context(secured(checkpoint, store, folder, *cold))
        lookup, worker, gateway = cluster.processes
        ended, failed, done = threading.Event(), [], [0, 0, 0]

        def load(number: int, ask: Callable[[], None]) -> None:
            while not ended.is_set():
                try:
                    ask()
                    done[number] += 1
                except Exception as error:  # noqa: BLE001 - every error counts as a failure
                    failed.append(error)

        kept = stack.enter_context(httpx.Client(verify=context(folder)))
        body = {"prompt": "def add", "max_tokens": 2}

        url = f"https://{gateway.address}/v1/completions"

        def over_one_connection() -> None:
            answer = kept.post(url, json=body)
            assert 200 == answer.status_code, answer.text

        def over_new_connections() -> None:
            answer = httpx.post(url, json=body, verify=context(folder))
            assert 200 == answer.status_code, answer.text

        def with_the_sdk() -> None:
            with Client(lookup.address, credentials=access(folder)) as client:
                assert 1 == len(client.tables())

        threads = [
            threading.Thread(target=load, args=each)
            for each in enumerate((over_one_connection, over_new_connections, with_the_sdk))
        ]
        for thread in threads:
            thread.start()

        def go_on() -> None:
            before = [*done]
            wait_until(lambda: failed or min(np.subtract(done, before)) >= 3)

        go_on()
        both = (old / "ca.pem").read_bytes() + (new / "ca.pem").read_bytes()
        replace_file(folder / "ca.pem", both)
        go_on()
        for name in ("service", "client"):
            use(new, f"{name}.pem", f"{name}.key")  # certificate and key do not match for a moment
            go_on()
        use(new, "ca.pem")
        go_on()
        ended.set()
        for thread in threads:
            thread.join()
        assert [] == failed, gateway.log.read_text(encoding="utf-8")
        outdated = ClientCredentials(f"{new}/ca.pem", f"{old}/client.pem", f"{old}/client.key")
        with (
            Client(lookup.address, 3, credentials=outdated) as client,
            pytest.raises(UnavailableError),
        ):
            client.tables()
        with (
            Client(lookup.address, 3, credentials=access(old)) as client,
            pytest.raises(UnavailableError, match="not signed by a trusted authority"),
        ):
            client.tables()
        for address in (gateway.address, worker.ready["metrics"]):
            host, port = address.split(":")
            with (
                socket.create_connection((host, int(port))) as raw,
                context(new).wrap_socket(raw, server_hostname=host) as connection,
            ):
                shown = ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True))
                assert (new / "service.pem").read_text(encoding="utf-8") == shown


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_ends_with_its_authority(
    checkpoint: Path, store: str, pki: Path, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """After a client's authority is removed, neither new nor resumed TLS sessions are accepted."""
    folder = tmp_path / "in-use"
    shutil.copytree(pki, folder)
    ensure_authority(tmp_path / "new")
    tls = context(pki)
    tls.minimum_version = tls.maximum_version = version
    tls.set_alpn_protocols(["h2", "http/1.1"])

    def session(address: str, before: ssl.SSLSession | None = None) -> ssl.SSLSession | None:
        """Return the TLS session after the server's first response."""
        host, port = address.split(":")
        with (
            socket.create_connection((host, int(port)), timeout=20) as raw,
            tls.wrap_socket(raw, server_hostname=host, session=before) as connection,
        ):
            http2 = connection.selected_alpn_protocol() == "h2"
            hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04" + bytes(5)
            connection.sendall(hello if http2 else b"GET /health HTTP/1.0\r\n\r\n")
            if not connection.recv(100):
                raise ConnectionError("the server closed the connection")
            return connection.session

    with (
        process("lookup", "--store", store, *LOCAL, *serving(folder)) as lookup,
        process("gateway", str(checkpoint), *LOCAL, *serving(folder)) as gateway,
    ):
        ports = gateway.address, lookup.ready["metrics"], lookup.address
        sessions = [session(address) for address in ports]
        replace_file(folder / "ca.pem", (tmp_path / "new" / "ca.pem").read_bytes())
        for address, before in zip(ports, sessions, strict=True):
            for kept in (before, None):
                with pytest.raises(OSError, match=r"."):
                    session(address, kept)


def test_redis_password_is_replaced(tmp_path: Path) -> None:
    """New connections to Redis use the current password of the file."""
    password = tmp_path / "password"
    password.write_text("first", encoding="utf-8")
    with (
        redis_server("--requirepass", "first") as url,
        closing(open_store(f"{url}?password_file={password}")) as store,
    ):
        assert [] == store.refs()
        with closing(Redis.from_url(url, password="first")) as redis:
            redis.config_set("requirepass", "second")
            redis.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(UnauthenticatedError):
            store.refs()
        password.write_text("second", encoding="utf-8")
        assert [] == store.refs()


def test_certs_are_made_from_the_shell(tmp_path: Path) -> None:
    """`tolhouse certs` creates an authority and certificates, with keys only the owner can read."""
    for more in ((), ("--name", "gateway", "--hosts", "gateway.example")):
        told = tolhouse("certs", tmp_path, *more).stdout
    assert f"{tmp_path}/gateway.pem {tmp_path}/gateway.key\n" == told
    names = {f"{name}.{kind}" for name in ("ca", "service", "gateway") for kind in ("pem", "key")}
    assert names == {p.name for p in tmp_path.iterdir()}
    assert {0o600} == {p.stat().st_mode & 0o777 for p in tmp_path.glob("*.key")}
    assert "for these hosts" in refusal("certs", str(tmp_path), "--hosts", "a host")
