"""The part of `loadtest.related` about tables as operated resources, at the command line."""

import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
from tolhouse.errors import NotFoundError
from tolhouse.store.base import Store, open_store
from tolhouse.testing import build_table, redis_server, tiny_model


def operated() -> dict[str, float | bool]:
    """Archive a table out of Redis and restore it, and copy it to another installation."""
    with tempfile.TemporaryDirectory() as name, redis_server() as url:
        folder = Path(name)
        model = tiny_model(folder / "model")
        ref = build_table(model, url, name="t", publish=False)
        there = f"file://{folder}/there"
        with closing(open_store(url)) as store, closing(open_store(there)) as other:
            before = _bytes(store, ref)
            file = folder / "t.safetensors"
            _tolhouse("export", ref, file, "--store", url)
            _tolhouse("import", file, "--store", there)
            copied = _bytes(other, ref)
            _tolhouse("archive", ref, "--to", folder, "--store", url)
            is_gone = False
            try:
                store.manifest(ref)
            except NotFoundError:
                is_gone = True
            _tolhouse("restore", ref, "--store", url)
            equal = before == _bytes(store, ref)
        return {"archive_restore_equal": is_gone and equal, "export_import_equal": before == copied}


def _bytes(store: Store, ref: str) -> bytes:
    """The manifest and all records of a version."""
    manifest = store.manifest(ref)
    records = store.read_records(manifest, np.arange(manifest.vocab_size, dtype=np.uint32))
    return manifest.to_json().encode() + records.tobytes()


def _tolhouse(*words: str | Path) -> None:
    command = [sys.executable, "-m", "tolhouse.cli", "tables", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
