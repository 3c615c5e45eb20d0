"""Finds and checks the table of a checkpoint: `python -m tolhouse.integrations.vllm.resolve`.

This is a process of its own, because vLLM may fork its processes later, and gRPC does not work in
the fork of a process that has used it. Reads {"options": …, "model": PATH} from stdin, and writes
{"table": "NAME@VERSION", "blocks": […]} or {"error": …} to stdout.
"""

import json
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from tolhouse.client.row_source import open_row_source
from tolhouse.config import VLLMConfig
from tolhouse.engine.row_providers import ComputedRows, RecomputedRows
from tolhouse.engine.table import check_table, wait_for_table
from tolhouse.errors import TolhouseError
from tolhouse.files import read_json
from tolhouse.integrations.vllm.gemma_table import check_gemma_table
from tolhouse.integrations.vllm.staging import choose_fallback
from tolhouse.logs import start_logging
from tolhouse.model.checkpoint import CONFIG, checkpoint_name, open_checkpoint
from tolhouse.table.manifest import Manifest


def resolve(options: VLLMConfig, model: str) -> Manifest:
    """Return the manifest of the table of the checkpoint in folder `model`.

    Raises an error if there is no such table, or if it was built from another checkpoint.
    """
    calling, timeout = options.client_credentials(), options.fetch_timeout_seconds
    with closing(open_row_source(options.rows, timeout, calling)) as source:
        name = options.table or checkpoint_name(Path(model))
        manifest = wait_for_table(source, name, options.lookup_wait_seconds)
        if str(read_json(Path(model) / CONFIG).get("model_type")).startswith("gemma"):
            gemma = check_gemma_table(manifest, Path(model))
            choose_fallback(options, partial(ComputedRows, gemma), manifest)
        else:
            checkpoint = open_checkpoint(model)
            check_table(manifest, checkpoint)
            choose_fallback(options, partial(RecomputedRows, checkpoint), manifest)
        return manifest


def main() -> None:
    given = json.load(sys.stdin)
    options = VLLMConfig(**given["options"])
    start_logging(options.log_level)
    answer: dict[str, Any]
    try:
        manifest = resolve(options, given["model"])
        answer = {"table": manifest.ref, "blocks": manifest.blocks}
    except TolhouseError as error:
        answer = {"error": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
