"""A certificate authority for development and tests: `tolhouse certs`. In production, certificates come from your own."""

import datetime as dt
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tolhouse.files import replace_file

CA_DAYS, LEAF_DAYS = 3650, 90
_PUBLIC = 0o644


def ensure_authority(folder: Path) -> Path:
    """The certificate ca.pem of the authority in `folder`, made with its key ca.key if it is not there."""
    path = folder / "ca.pem"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Tolhouse development CA")
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = _builder(name, name, key.public_key(), dt.timedelta(days=CA_DAYS))
    builder = builder.add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    ).add_extension(usage, critical=True)
    builder = builder.add_extension(
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
    )
    replace_file(folder / "ca.key", _pem(key))
    replace_file(
        path, builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), _PUBLIC
    )
    return path


def issue(
    folder: Path,
    name: str,
    hosts: Iterable[str],
    valid: dt.timedelta = dt.timedelta(days=LEAF_DAYS),
) -> tuple[Path, Path]:
    """A certificate `name`.pem for `hosts`, names or addresses, and its key `name`.key, signed by the authority in `folder`.

    It serves for both ends of a connection. Files that are there are replaced whole, so that processes that watch them see
    no half of one.
    """
    authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(name), authority.subject, key.public_key(), valid)
    builder = builder.add_extension(
        x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False
    )
    builder = builder.add_extension(
        x509.BasicConstraints(ca=False, path_length=None), critical=True
    )
    uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = builder.add_extension(uses, critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = builder.add_extension(identifier, critical=False)
    certificate, private = folder / f"{name}.pem", folder / f"{name}.key"
    replace_file(private, _pem(key))
    replace_file(
        certificate,
        builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
        _PUBLIC,
    )
    return certificate, private


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, valid: dt.timedelta
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    begin = (
        now - dt.timedelta(hours=1) + min(valid, dt.timedelta())
    )  # clocks differ; one that has expired began before
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return (
        builder.serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(now + valid)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())
