"""`tolhouse …`: every process and every tool. Reads configuration once and hands on plain values.

A command imports what it needs when it runs: `tolhouse lookup` works where torch is not installed.
"""

import sys

try:
    import click
except ModuleNotFoundError:
    sys.exit("error: the package click is not installed: pip install 'tolhouse[cli]'")

from tolhouse import __version__
from tolhouse.cli import models, services, tables
from tolhouse.cli.options import Commands
from tolhouse.config import commit

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}


@click.group(cls=Commands, context_settings=SETTINGS)
@click.version_option(f"{__version__} {commit()}".strip(), prog_name="tolhouse")
def main() -> None:
    """Serve language models whose feed-forward layers are looked up, not computed.

    \b
    From checkpoint to serving:
      tolhouse train demo --out models/mine                 train a checkpoint from scratch
      tolhouse build models/mine                            compute its table of rows, with Ray
      tolhouse publish mine@VERSION                         let the name stand for that version
      tolhouse lookup                                       serve tables over gRPC
      tolhouse worker models/mine                           serve tokens: attention, with those rows
      tolhouse gateway models/mine                          serve text: OpenAI's HTTP API
      tolhouse demo                                         all of it, on the demo checkpoint

    The environment gives options too, by the variables in brackets; the command line wins.
    """


for command in (
    *(models.train, tables.build, tables.compress, tables.tables, tables.publish, tables.rollback),
    *(tables.overlay, services.lookup, services.compile_, services.worker, services.gateway),
    *(services.keys, services.certs),
    *(models.generate, models.fetch, models.evaluate, models.explain),
    *(services.demo, services.serve),
):
    main.add_command(command)
