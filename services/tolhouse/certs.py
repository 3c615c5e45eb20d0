"""A certificate authority for development and tests. Use your own in production."""

import datetime as dt
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trustme import CA

from tolhouse.errors import InvalidArgumentError
from tolhouse.files import replace_file

_PUBLIC = 0o644


def ensure_authority(folder: Path) -> Path:
    """Return the path of ca.pem, the authority in `folder`.

    If the folder has no authority, ca.pem and ca.key are created.
    """
    path = folder / "ca.pem"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        authority = CA(path_length=0, organization_name="Tolhouse development")
        replace_file(folder / "ca.key", authority.private_key_pem.bytes())
        replace_file(path, authority.cert_pem.bytes(), _PUBLIC)
    return path


def issue(
    folder: Path, name: str, hosts: Iterable[str], valid: dt.timedelta = dt.timedelta(days=90)
) -> tuple[Path, Path]:
    """Issue the certificate `name`.pem for host names or addresses, with the key `name`.key."""
    authority = CA.from_pem((folder / "ca.pem").read_bytes(), (folder / "ca.key").read_bytes())
    now = dt.datetime.now(dt.UTC)
    # The start is an hour ago, because the clocks of machines differ.
    start = now - dt.timedelta(hours=1) + min(valid, dt.timedelta())
    more: Any = {"common_name": name[:64], "not_before": start, "not_after": now + valid}
    try:
        leaf = authority.issue_cert(*hosts, **more)
    except ValueError as error:
        raise InvalidArgumentError(f"cannot issue a certificate for these hosts: {error}") from None
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    replace_file(key, leaf.private_key_pem.bytes())
    replace_file(certificate, leaf.cert_chain_pems[0].bytes(), _PUBLIC)
    return certificate, key
