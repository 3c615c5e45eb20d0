"""Credentials of callers: API keys of the gateway, and certificates for development."""

from pathlib import Path

import click

from tolhouse.cli.options import Commands

keys_file = click.argument("file", type=Path)


@click.group(cls=Commands)
def keys() -> None:
    """Make, list and remove API keys; FILE keeps their hashes, and gateways read it again."""


@keys.command("add")
@keys_file
@click.argument("name")
@click.option("--requests-per-minute", default=600.0, help="Rate; a sixth may come at once.")
@click.option("--concurrent", default=16, help="Requests in flight.")
def add_key(file: Path, name: str, requests_per_minute: float, concurrent: int) -> None:
    """Make a key for NAME and print it, once: FILE keeps its hash alone."""
    from tolhouse.gateway import auth

    click.echo(auth.add_key(file, name, requests_per_minute, concurrent))


@keys.command("list")
@keys_file
def list_keys(file: Path) -> None:
    """List names and limits."""
    from tolhouse.gateway import auth

    for name, key in sorted(auth.read_keys(str(file)).items()):
        rate = f"{key.requests_per_minute:g} requests a minute"
        click.echo(f"{name}  {rate}, {key.concurrent} at once")


@keys.command("remove")
@keys_file
@click.argument("name")
def remove_key(file: Path, name: str) -> None:
    """Remove the key of NAME; requests in flight are completed."""
    from tolhouse.gateway import auth

    auth.remove_key(file, name)


@click.command()
@click.argument("folder", type=Path)
@click.option("--name", default="service", help="Of NAME.pem and NAME.key.")
@click.option("--hosts", default="localhost,127.0.0.1,::1", help="Names and addresses it is for.")
def certs(folder: Path, name: str, hosts: str) -> None:
    """Make a certificate for development in FOLDER, signed by the authority there.

    ca.pem is the authority, made if there is none; NAME.pem and NAME.key serve for both ends of a
    connection, for 90 days. In production, certificates come from an authority of your own.
    """
    from tolhouse.certs import ensure_authority, issue

    ensure_authority(folder)
    names = [host.strip() for host in hosts.split(",") if host.strip()]
    click.echo(" ".join(map(str, issue(folder, name, names))))
