"""The command `tolhouse`, which starts every process and every tool.

It reads the configuration once and passes plain values on. Each command imports its packages when
it runs, so that `tolhouse lookup` works without torch.
"""

import sys

try:
    import click
except ModuleNotFoundError:
    sys.exit("error: the package click is not installed: pip install 'tolhouse[cli]'")

from tolhouse import __version__
from tolhouse.cli import archives, convert, imports, models, services, tables
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
      tolhouse publish mine@VERSION                         make it the published version
      tolhouse lookup                                       serve tables over gRPC
      tolhouse worker models/mine                           serve tokens: attention over these rows
      tolhouse gateway models/mine                          serve text: OpenAI's HTTP API
      tolhouse demo                                         run all of this on the demo checkpoint

    Options can also be set by the environment variables in brackets. The command line takes
    precedence.
    """


for command in (
    *(models.train, models.train_gates, convert.convert, tables.build, tables.compress),
    *(tables.tables, tables.publish, tables.rollback, tables.overlay),
    *(services.lookup, services.compile_, services.worker, services.gateway),
    *(services.keys, services.certs),
    imports.import_,
    *(models.generate, models.fetch, models.evaluate, models.explain),
    *(services.demo, services.serve),
):
    main.add_command(command)
for command in (archives.archive, archives.restore, archives.export, archives.import_version):
    tables.tables.add_command(command)
