"""A version as one self-describing file: exported, verified elsewhere, and imported.

It is a safetensors file. Its metadata has the manifests and the log of the version. Its tensors are
the records: "name@version/SHARD", uint8 [records, record_bytes], in the order of the manifests and
of the shards. Auxiliary tables come first, and the version is the last one. The parent of an
overlay is not included.

Reading and writing need the memory of one chunk, and importing that of two shards.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tolhouse.errors import (
    CorruptError,
    InUseError,
    InvalidArgumentError,
    NotFoundError,
    TolhouseError,
    UnavailableError,
)
from tolhouse.store import registry
from tolhouse.store.base import Store
from tolhouse.store.journal import Entry, Event, checked
from tolhouse.store.writer import shard_digest
from tolhouse.table.manifest import Manifest, record_views

FORMAT = "tolhouse-table-1"
_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_CHUNK_BYTES = 16 << 20

Report = Callable[[int], object]  # a function of the number of bytes that were just done


def _nothing(_: int) -> None:
    pass


@dataclass(frozen=True)
class _Section:
    """The records of a shard in a file: bytes `start` to `end` after the header."""

    manifest: Manifest
    shard: int
    start: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.manifest.ref}/{self.shard}"

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the ids of the records, some at a time, as uint32."""
        step = max(1, _CHUNK_BYTES // self.manifest.record_bytes)
        starts = range(0, self.manifest.shard_size(self.shard), step)
        return (self.manifest.shard_ids(self.shard, at, at + step) for at in starts)

    def check(self, digest: str, where: str) -> None:
        """Raise CorruptError if the manifest has another digest of the shard."""
        if self.manifest.shards[self.shard] != digest:
            what = f"shard {self.shard} of {self.manifest.ref} is damaged in {where}"
            raise CorruptError(f"{what}: its digest is not that of the manifest")


def _sections(manifests: list[Manifest]) -> list[_Section]:
    found, at = list[_Section](), 0
    for manifest in manifests:
        for shard in range(manifest.num_shards):
            size = manifest.shard_size(shard) * manifest.record_bytes
            found.append(_Section(manifest, shard, at, at + size))
            at += size
    return found


def _tensors(sections: list[_Section]) -> dict[str, Any]:
    """Return the descriptions of the tensors in the header."""
    tensors = {}
    for section in sections:
        size = section.manifest.record_bytes
        shape = [(section.end - section.start) // size, size]
        offsets = [section.start, section.end]
        tensors[section.name] = {"dtype": "U8", "shape": shape, "data_offsets": offsets}
    return tensors


def _require_digests(manifests: list[Manifest]) -> None:
    """Raise InvalidArgumentError if a manifest has no digests of its shards."""
    if bare := [manifest.ref for manifest in manifests if not manifest.shards]:
        raise InvalidArgumentError(f"{bare[0]} has no digests of its shards: build it again")


class TableFile:
    """An exported version.

    Attributes:
        path: The file.
        manifests: The manifests of auxiliary tables and, as the last one, of the version.
        log: The log of the version at its export.
        num_bytes: The size of the file.

    Raises:
        NotFoundError: There is no such file.
        InvalidArgumentError: The file is not an exported version, or was exported by a later
            release.
        CorruptError: The file is truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.num_bytes = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                text = file.read(length) if length <= _HEADER_BYTES else b""
        except FileNotFoundError:
            raise NotFoundError(f"there is no file {path}") from None
        except OSError as error:
            raise UnavailableError(f"cannot read {path}: {error.strerror or error}") from None
        self._start = 8 + length
        tensors, metadata = self._header(text, length)
        try:
            manifests = json.loads(metadata["manifests"])
            self.manifests = [Manifest.from_json(one) for one in manifests]
            _require_digests(self.manifests)
            self.log: list[Entry] = [*map(checked, json.loads(metadata["log"]))]
        except (InvalidArgumentError, CorruptError) as error:
            raise type(error)(f"{path}: {error}") from None
        except (LookupError, TypeError, RecursionError, ValueError) as error:
            raise CorruptError(f"{path}: the header is damaged: {error!r:.80}") from None
        self._sections = _sections(self.manifests)
        parts = registry.own_auxiliary(self.manifests[-1]) if self.manifests else ()
        fits = self.manifests and list(parts) == [m.ref for m in self.manifests[:-1]]
        if not fits or tensors != _tensors(self._sections):
            raise CorruptError(f"{path}: the header is damaged: its parts do not fit together")
        end = self._start + (self._sections[-1].end if self._sections else 0)
        if self.num_bytes != end:
            kind = "truncated" if self.num_bytes < end else "damaged"
            raise CorruptError(f"{path} is {kind}: it has {self.num_bytes} of {end} bytes")

    @property
    def manifest(self) -> Manifest:
        """The manifest of the version."""
        return self.manifests[-1]

    def verify(self, report: Report = _nothing) -> str:
        """Read the whole file, check all digests, and return the SHA-256 of the file.

        Raises CorruptError if the file is damaged.
        """
        whole = hashlib.sha256()
        with self.path.open("rb") as file:
            whole.update(file.read(self._start))
            for section in self._sections:
                digest = xxhash.xxh3_128()
                for ids in section.chunks():
                    records = self._records(file, section, ids)
                    whole.update(records.data)
                    digest.update(records.data)
                    report(records.nbytes)
                section.check(digest.hexdigest(), str(self.path))
        return whole.hexdigest()

    def shards(self, ref: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each shard of a manifest with its verified records uint8 [T, record_bytes]."""
        with self.path.open("rb") as file:
            for section in self._sections:
                if section.manifest.ref == ref:
                    file.seek(self._start + section.start)
                    ids = section.manifest.shard_ids(section.shard)
                    records = self._records(file, section, ids)
                    section.check(xxhash.xxh3_128_hexdigest(records.data), str(self.path))
                    yield section.shard, records

    def _records(self, file: BufferedReader, section: _Section, ids: np.ndarray) -> np.ndarray:
        records = np.empty((len(ids), section.manifest.record_bytes), np.uint8)
        if file.readinto(records.reshape(-1).data) != records.nbytes:
            raise CorruptError(f"{self.path} was truncated while it was read")
        try:
            section.manifest.verify(ids, record_views(records))
        except CorruptError as error:
            raise CorruptError(f"{self.path} is damaged: {error}", error.token_ids) from None
        return records

    def _header(self, text: bytes, length: int) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the tensors and the metadata of the header."""
        other = f"{self.path} is not a table exported by `tolhouse tables export`"
        if b"\0" in text or not text.startswith(b"{"):
            raise InvalidArgumentError(other)
        if len(text) < length:
            raise CorruptError(f"{self.path} is truncated: it ends within its header")
        try:
            tensors = json.loads(text)
            metadata = tensors.pop("__metadata__", {})
            form = metadata.get("format", "")
        except (ValueError, AttributeError, RecursionError):
            raise InvalidArgumentError(f"{other}: its header is not JSON of safetensors") from None
        if form != FORMAT:
            newer = str(form).startswith("tolhouse-table-")
            hint = f": its format {form!r:.40} needs a newer tolhouse" if newer else ""
            raise InvalidArgumentError(f"{other}{hint}")
        return tensors, metadata


def export(store: Store, ref: str, path: Path, report: Report = _nothing) -> str:
    """Write a version with its auxiliary tables to a new file, and return the file's SHA-256.

    Raises:
        NotFoundError: The version is missing.
        InUseError: The file exists.
        CorruptError: Rows are missing or damaged in the store.
    """
    if path.exists():
        raise InUseError(f"{path} exists: name a new file")
    version = registry.resolve(store, ref)
    manifests = registry.with_own_auxiliary(store, version)
    _require_digests(manifests)
    sections = _sections(manifests)
    log = [e for e in store.log() if f"{e['name']}@{e['version']}" == version.ref]
    log = [{key: e[key] for key in e if key != "history"} for e in log]  # or it would grow forever
    metadata = {"format": FORMAT, "manifests": json.dumps([m.to_json() for m in manifests])}
    metadata["log"] = json.dumps(log)
    header = {"__metadata__": metadata, **_tensors(sections)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole = hashlib.sha256()
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:

            def write(data: bytes | memoryview) -> None:
                whole.update(data)
                file.write(data)

            write(len(text).to_bytes(8, "little"))
            write(text)
            for section in sections:
                digest = xxhash.xxh3_128()
                for ids in section.chunks():
                    records = store.read_records(section.manifest, ids)
                    digest.update(records.data)
                    write(records.data)
                    report(records.nbytes)
                section.check(digest.hexdigest(), store.url)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if isinstance(error, TolhouseError):  # of the store
            raise
        raise UnavailableError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return whole.hexdigest()


def import_file(
    store: Store,
    file: TableFile,
    /,
    event: Event = "imported",
    report: Report = _nothing,
    **more: Any,
) -> Manifest:
    """Write a version from a file, with identical bytes, and return its manifest.

    Complete shards are kept. Each shard is read again from the store and compared with its digest.

    Raises:
        NotFoundError: A table on which it depends is neither in the store nor in the file.
        InUseError: The version is in the store with other bytes.
        CorruptError: The file is damaged, or the store has not kept the bytes.
    """
    parts = {manifest.ref for manifest in file.manifests}
    for ref in (ref for m in file.manifests for ref in m.dependencies if ref not in parts):
        try:
            store.manifest(ref)
        except NotFoundError:
            what = f"{file.manifest.ref} needs {ref}, which is not in {store.url}"
            raise NotFoundError(f"{what}: import that first") from None
    for manifest in file.manifests:
        _import_part(store, file, manifest, event, report, more)
    return file.manifest


def _import_part(
    store: Store,
    file: TableFile,
    manifest: Manifest,
    event: Event,
    report: Report,
    more: dict[str, Any],
) -> None:
    registry.begin(store, manifest)
    is_there = False
    with suppress(NotFoundError, CorruptError):
        is_there = store.manifest(manifest.ref).shards == manifest.shards
        if not is_there:
            what = f"{manifest.ref} is in {store.url} already, with other bytes than {file.path}"
            raise InUseError(f"{what}: delete it first")
    for shard, records in file.shards(manifest.ref):
        digest = xxhash.xxh3_128_hexdigest(records.data)
        if shard_digest(store, manifest, shard) != digest:
            store.write_shard(manifest, shard, records)
            if shard_digest(store, manifest, shard) != digest:
                what = f"{store.url} has not kept shard {shard} of {manifest.ref}"
                raise CorruptError(f"{what}: import it again")
        report(records.nbytes)
    if not is_there:
        history = file.log if event == "imported" and manifest is file.manifest else []
        registry.commit(store, manifest, event, history=history, **more)


def archive(store: Store, ref: str, folder: Path, report: Report = _nothing) -> Path:
    """Move a version to a file in a folder, verify the file, and remove the rows from the store.

    A version that is published, in use or a part of another one is refused. What an interrupted
    command has left is completed, from the file in the log if the log has the archive. The log has
    the file and its SHA-256.
    """
    path = folder.absolute() / f"{ref}.safetensors"
    if store.is_being_deleted(ref) and ref not in store.refs():
        last = [e["event"] for e in store.log() if f"{e['name']}@{e['version']}" == ref][-1:]
        if last not in (["building"], ["deleted"]):
            return _completed(store, ref, path, is_logged=last == ["archived"])
    registry.refuse_in_use(store, ref)
    manifest = registry.resolve(store, ref)
    if not path.exists():
        export(store, ref, path, report)
    file = TableFile(path)
    if file.manifests != registry.with_own_auxiliary(store, manifest):
        raise InUseError(f"{path} exists, with another table: name another folder")
    sha256 = file.verify()
    registry.delete(store, ref, event="archived", file=str(path), sha256=sha256)
    return path


def _completed(store: Store, ref: str, path: Path, is_logged: bool) -> Path:
    """Complete an archive that has removed the manifest, and return the path of its file."""
    file = archived_file(store, ref) if is_logged else _file_of(ref, path)
    more = {} if is_logged else {"file": str(path), "sha256": file.verify()}
    refs = [m.ref for m in file.manifests if store.is_being_deleted(m.ref)]
    registry.complete_archive(store, ref, refs, **more)
    return file.path


def _file_of(ref: str, path: Path) -> TableFile:
    file = TableFile(path)
    if file.manifest.ref != ref:
        raise InvalidArgumentError(f"{path} has table {file.manifest.ref}, not {ref}")
    return file


def archived_file(store: Store, ref: str, path: Path | None = None) -> TableFile:
    """Return the verified file of an archived version.

    The default path, and the SHA-256 that the file must have, are those of the log.
    """
    entry = _archived(store, ref)
    if "file" not in entry or "sha256" not in entry:
        what = f"the log of {store.url} has no archive of {ref}"
        raise NotFoundError(f"{what}: write its file with `tolhouse tables import`")
    file = _file_of(ref, path or Path(entry["file"]))
    check_sha256(file, entry["sha256"])
    return file


def _archived(store: Store, ref: str) -> Entry:
    """Return the last entry of an archive of the version in the log, or an empty one."""
    named = {f"{e['name']}@{e['version']}": e for e in store.log() if e["event"] == "archived"}
    return named.get(ref, {})


def check_sha256(file: TableFile, expected: str, report: Report = _nothing) -> str:
    """Verify a file, and return its SHA-256. Raises CorruptError if `expected` is another one."""
    found = file.verify(report)
    if expected and expected.lower() != found:
        raise CorruptError(f"{file.path} has the SHA-256 {found}, not {expected}: it was altered")
    return found
