"""Rules for Redis ACLs that grant permissions on tables by name. They need Redis 7 or Valkey.

Redis checks keys. Rows have keys of their own for each version, so reading and writing them is
limited by name. The registry is one hash for each kind of text, so Redis can limit it by kind only.
An update of the registry also declares a key for each changed name, which does not exist. A user
without permission on it cannot change that name with Tolhouse.
"""

from collections.abc import Iterable, Sequence

from tolhouse.net.auth import Token, with_parts

_R = "tolhouse:{registry}"
_READ = "+@read -@dangerous -@admin"
_CONNECT = "+@connection -@dangerous -@admin +info +cluster|slots +cluster|nodes +cluster|shards"
_CONNECT += " +readonly +acl|whoami"


def guard(kind: str, name: str) -> str:
    """Return the key that an update declares for a changed name."""
    return f"{_R}:{kind}:{name}"


def rule(token: Token) -> list[str]:
    """Return the words of the ACL SETUSER command for a token with a user."""
    admin, publish, read = (_forms(token.names(kind)) for kind in ("admin", "publish", "read"))
    publish, read = [*admin, *publish], [*admin, *publish, *read]
    texts = [f"~{_R}:{kind}" for kind in ("changed", "alias", "log")]
    words = ["reset", "on", f"#{token.sha256}", "resetchannels", *_READ.split(), *_CONNECT.split()]
    words += [f"%R~{_R}:*", "%R~tolhouse:tables", *_keys("%R~tolhouse:{NAME@*", read)]
    words += _selector("+set", _keys(f"%W~{_R}:lease:NAME@*", read))
    if publish:
        guards = _keys(f"~{_R}:alias:NAME", publish)
        kinds = ["manifest", "deleting"] if admin else []
        for kind in kinds:
            guards += _keys(f"~{_R}:{kind}:NAME", admin)
        texts += [f"~{_R}:{kind}" for kind in kinds]
        hashes = [f"~{_R}:{kind}" for kind in ("alias", *kinds)]
        words += _selector("+eval", [*texts, *guards])
        words += _selector("+get +set", [f"~{_R}:changed"])
        words += _selector("+hset +hdel", hashes)
        words += _selector("+rpush", [f"~{_R}:log"])  # nothing shortens the log
    if admin:
        commands = f"{_READ} +eval +hset +hdel +set +expire +persist +rename +unlink"
        words += _selector(commands, _keys("~tolhouse:{NAME@*", admin))
        words += _selector("+srem", ["~tolhouse:tables"])
    return words


def _forms(names: Iterable[str]) -> list[str]:
    """Return names, each with its auxiliary tables."""
    return [form for name in names for form in with_parts(name)]


def _keys(pattern: str, names: Sequence[str]) -> list[str]:
    return [pattern.replace("NAME", name) for name in names]


def _selector(commands: str, keys: Sequence[str]) -> list[str]:
    return [f"({commands} {' '.join(keys)})"] if keys else []
