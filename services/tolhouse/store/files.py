"""The file store: a folder per version, a safetensors file per shard, served straight from a mapping.

    <root>/<name>/<version>/shard-00000-of-00064.safetensors    one uint8 tensor "records" [rows, record_bytes]
    <root>/<name>/<version>/manifest.json                       written last
    <root>/<name>/<version>/lease                               empty; when it was last used
    <root>/<name>/alias.json                                    what the name stands for

Files with contents are written under a temporary name, fsynced and renamed; shards and manifests never change.
"""

import contextlib
import json
import mmap
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tolhouse.errors import Corrupt, InvalidArgument, NotFound, TolhouseError, Unavailable
from tolhouse.store import LEASE_SECONDS, Alias, Store, by_shard
from tolhouse.table.manifest import Manifest, check_name, split_ref
from tolhouse.table.records import Buffer


class FileStore(Store):
    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        if self.root.exists() and not self.root.is_dir():
            raise InvalidArgument(f"the store {self.root} is a file, and no folder of tables")
        self.url = f"file://{self.root}"
        self._parents = {}
        self._shards: dict[Path, _Shard] = {}
        self._lock = threading.Lock()

    def refs(self) -> list[str]:
        found = []
        for path in self.root.glob("*/*/manifest.json"):
            ref = f"{path.parent.parent.name}@{path.parent.name}"
            with contextlib.suppress(InvalidArgument):
                split_ref(ref)
                found.append(ref)
        return sorted(found)

    def manifest(self, ref: str) -> Manifest:
        name, version = split_ref(ref)
        path = self.root / name / str(version) / "manifest.json"
        try:
            manifest = Manifest.from_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"table {ref} is not in {self.url}") from None
        except (InvalidArgument, Corrupt) as error:
            raise Corrupt(f"{path}: {error}") from None
        if manifest.ref != ref:
            raise Corrupt(f"{path} describes table {manifest.ref}")
        return manifest

    def own_records(
        self, manifest: Manifest, ids: np.ndarray
    ) -> Iterator[tuple[np.ndarray, list[Buffer]]]:
        for shard, places in by_shard(manifest, ids):
            try:
                rows = self._shard(manifest, shard).records()
                found: list[Buffer] = [
                    rows[row].data for row in manifest.positions(shard, ids[places]).tolist()
                ]
                manifest.verify(ids[places], found)
            except Corrupt:
                self._forget(
                    manifest, shard
                )  # the file may be mended by a rebuild, under the same name
                raise
            yield places, found

    def write_shard(self, manifest: Manifest, shard: int, records: np.ndarray) -> None:
        path = self._path(manifest, shard)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"records": np.ascontiguousarray(records)}, partial)
            partial.chmod(
                0o644
            )  # safetensors keeps its files to their owner; a service may run as another user
            _sync(partial)
            partial.replace(path)
            _sync(path.parent)
        except (OSError, SafetensorError) as error:
            raise Unavailable(
                f"can't write {path}: {getattr(error, 'strerror', None) or error}"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        self._forget(manifest, shard)

    def count(self, manifest: Manifest, shard: int) -> int:
        try:
            return len(self._shard(manifest, shard).records())
        except TolhouseError:
            return 0

    def commit(self, manifest: Manifest) -> None:
        _write(self.root / manifest.name / manifest.version / "manifest.json", manifest.to_json())

    def delete(self, manifest: Manifest) -> None:
        folder = self.root / manifest.name / manifest.version
        (folder / "manifest.json").unlink(missing_ok=True)
        for shard in range(manifest.num_shards):
            self._forget(manifest, shard)
        shutil.rmtree(folder)

    def alias(self, name: str) -> Alias | None:
        path = self.root / check_name(name) / "alias.json"
        try:
            return Alias.from_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Corrupt as error:
            raise Corrupt(f"{path} {error}") from None

    def set_alias(self, name: str, alias: Alias | None) -> None:
        path = self.root / check_name(name) / "alias.json"
        if alias is None:
            path.unlink(missing_ok=True)
        else:
            _write(path, alias.to_json())

    def lease(self, manifest: Manifest) -> None:
        try:
            self._lease(manifest).touch()
        except OSError as error:
            raise Unavailable(
                f"can't write {self._lease(manifest)}: {error.strerror or error}"
            ) from None

    def leased(self, manifest: Manifest) -> bool:
        try:
            return time.time() - self._lease(manifest).stat().st_mtime < LEASE_SECONDS
        except OSError:
            return False

    def close(self) -> None:
        with self._lock:
            self._shards.clear()

    def _lease(self, manifest: Manifest) -> Path:
        return self.root / manifest.name / manifest.version / "lease"

    def _path(self, manifest: Manifest, shard: int) -> Path:
        return (
            self.root
            / manifest.name
            / manifest.version
            / f"shard-{shard:05}-of-{manifest.num_shards:05}.safetensors"
        )

    def _shard(self, manifest: Manifest, shard: int) -> "_Shard":
        path = self._path(manifest, shard)
        with self._lock:
            opened = self._shards.get(path)
            if opened is None:
                opened = self._shards[path] = _Shard(
                    path, len(manifest.shard_ids(shard)), manifest.record_bytes
                )
            return opened

    def _forget(self, manifest: Manifest, shard: int) -> None:
        with self._lock:
            self._shards.pop(self._path(manifest, shard), None)


class _Shard:
    """One mapped shard file."""

    def __init__(self, path: Path, rows: int, record_bytes: int) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                start = _header(file, path, rows, record_bytes)
                self.size = start + rows * record_bytes
                found = os.fstat(file.fileno()).st_size
                if found != self.size:
                    raise Corrupt(
                        f"shard file {path} has {found} bytes instead of {self.size}: truncated, or another file"
                    )
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise Corrupt(f"shard file {path} is missing") from None
        except OSError as error:
            raise Unavailable(f"can't read {path}: {error.strerror or error}") from None
        self._records = np.frombuffer(self._mapped, np.uint8, offset=start).reshape(
            rows, record_bytes
        )

    def records(self) -> np.ndarray:
        """uint8 [rows, record_bytes]; Corrupt if the file has shrunk, where reading the mapping would kill the process."""
        if self._mapped.size() != self.size:
            raise Corrupt(f"shard file {self.path} was cut short while in use")
        return self._records


def _header(file: BinaryIO, path: Path, rows: int, record_bytes: int) -> int:
    """Where the records begin; Corrupt unless the file says that it holds what it should."""
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        tensor = json.loads(file.read(min(length, 1 << 20)))["records"]
        ok = (
            tensor["dtype"] == "U8"
            and tensor["shape"] == [rows, record_bytes]
            and tensor["data_offsets"][0] == 0
        )
    except (struct.error, ValueError, KeyError, TypeError, IndexError, RecursionError):
        ok = False
    if not ok:
        raise Corrupt(
            f"shard file {path} is truncated or not a shard of {rows} records of {record_bytes} bytes"
        )
    return 8 + length


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise Unavailable(f"can't write {path}: {error.strerror or error}") from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
