"""Copies of checkpoints, tensors and files at URLs that fsspec reads, such as s3:// and https://.

The copies are in the folder of temporary files, and are deleted at the end of a `with` block. The
rest of Tolhouse reads local files only.
"""

import difflib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from tolhouse.errors import InvalidArgumentError, NotFoundError, TolhouseError, UnavailableError
from tolhouse.model.checkpoint import CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG
from tolhouse.model.tokenizer import TOKENIZER
from tolhouse.model.weights import (
    HEADER_BYTES,
    INDEX,
    WEIGHTS,
    StoredTensor,
    parse_header,
    parse_index,
)
from tolhouse.sources.tensor import LIKELY, find_tensor

_PART_BYTES = 1 << 24  # one read
_SECONDS = 60.0  # without a byte from a server of HTTP
_BESIDE = (GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE)  # may be absent


def is_url(place: str) -> bool:
    return "://" in place


def local_checkpoint(url: str) -> AbstractContextManager[Path]:
    """Copy the checkpoint in the folder `url`. The copy has the name of the folder.

    This function and the others raise NotFoundError if a file is missing, InvalidArgumentError if
    one is malformed or the URL cannot be read, and UnavailableError if the server fails.
    """
    return _copy_of(url, _copy_checkpoint)


def local_file(url: str) -> AbstractContextManager[Path]:
    """Copy the file `url`. The copy has the name of the file."""
    return _copy_of(url, _copy)


def local_tensor(url: str, tensor: str) -> AbstractContextManager[Path]:
    """Copy one tensor of a file or a folder `url` to a safetensors file, or to such a folder.

    It is copied as a whole, because each shard of a table has rows from all parts of the tensor.
    """
    return _copy_of(url, lambda fs, root, file: _copy_tensor(fs, root, tensor, file))


@contextmanager
def _copy_of(url: str, copy: Any) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tolhouse-") as folder:
        with _without_secrets(), _store_errors(url):
            fs, root = _filesystem(url)
            root = root.rstrip("/")
            path = Path(folder) / (_name(root) or "copy")
            copy(fs, root, path)
        try:
            yield path
        except TolhouseError as error:  # name the URL, in place of the copy
            named = str(error).replace(str(path), _public(url.rstrip("/")))
            error.args = (named, *error.args[1:])
            raise


@contextmanager
def _without_secrets() -> Iterator[None]:
    try:
        yield
    except TolhouseError as error:
        error.args = (_public(str(error)), *error.args[1:])
        raise


def _public(text: str) -> str:
    """Remove user, password and query from the URLs in a text."""
    text = re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)
    return re.sub(r"://[^/\s@]*@", "://", text)


def _name(root: str) -> str:
    """Return the last part of a path, without a revision as in OWNER/MODEL@main, or a query."""
    name = _public(root).partition("?")[0].rpartition("/")[2]
    return name.partition("@")[0]


def _copy_checkpoint(fs: Any, root: str, folder: Path) -> None:
    """Copy the files that Tolhouse reads. Servers need not list a folder."""
    folder.mkdir()
    _copy(fs, f"{root}/{CONFIG}", folder / CONFIG)
    weights = [WEIGHTS]
    if not _is_file(fs, f"{root}/{WEIGHTS}"):
        weights = [INDEX, *sorted({*_index(fs, root).values()})]
    for name in [*(name for name in _BESIDE if _is_file(fs, f"{root}/{name}")), *weights]:
        _copy(fs, _part(fs, root, name), folder / name)


def _copy(fs: Any, place: str, path: Path) -> None:
    with _open(fs, place) as file, path.open("wb") as out:
        _copy_bytes(file, out, fs.size(place), path.name)


def _copy_tensor(fs: Any, root: str, tensor: str, path: Path) -> None:
    place = _place(fs, root, tensor)
    if place != root:  # the copy of a folder is a folder, with the tokenizer
        path.mkdir()
        if _is_file(fs, f"{root}/{TOKENIZER}"):
            _copy(fs, f"{root}/{TOKENIZER}", path / TOKENIZER)
        path /= WEIGHTS
    with _open(fs, place) as file, path.open("wb") as out:
        stored = find_tensor(_header(file, fs.size(place), place), tensor, place)
        _skip(file, stored.start)
        about = {"dtype": stored.dtype, "shape": stored.shape}
        header = json.dumps({tensor: {**about, "data_offsets": [0, stored.bytes]}}).encode()
        out.write(len(header).to_bytes(8, "little") + header)
        _copy_bytes(file, out, stored.bytes, tensor)


def _is_file(fs: Any, place: str) -> bool:
    """Whether the file exists. Unlike `fs.isfile`, this raises errors of the server.

    Without the permission to list, S3 and others answer 403 for an absent file.
    """
    try:
        return fs.info(place)["type"] == "file"
    except PermissionError:
        return False
    except (FileNotFoundError, NotADirectoryError) as error:
        if _is_missing(error) or getattr(error.__cause__, "status", 0) in (403, 410):
            return False
        raise


def _is_missing(error: OSError) -> bool:
    """Whether no file is there. fsspec's HTTP client raises FileNotFoundError for all errors."""
    cause = error.__cause__
    return not isinstance(cause, OSError) and getattr(cause, "status", 404) == 404


def _open(fs: Any, place: str) -> Any:
    # A server that does not announce ranges may send the whole file for each of them.
    is_stream = "http" in fs.protocol and not fs.info(place).get("partial")
    return fs.open(place, "rb", **({"block_size": 0} if is_stream else {"cache_type": "none"}))


def _copy_bytes(file: Any, out: BinaryIO, count: int | None, what: str) -> None:
    """Copy the next `count` bytes, or all if the server does not tell the size."""
    look: Any = {"unit": "B", "unit_scale": True, "disable": None, "dynamic_ncols": True}
    done = 0
    with tqdm(total=count, desc=f"download {what}", leave=False, **look) as bar:
        while count is None or done < count:
            size = _PART_BYTES if count is None else min(_PART_BYTES, count - done)
            if not (part := file.read(size)):
                break
            out.write(part)
            done += len(part)
            bar.update(len(part))
    if count is not None and done < count:
        raise UnavailableError(f"{what} ended after {done} of {count} bytes")


def _skip(file: Any, to: int) -> None:
    """Move to byte `to`. A stream of a server without ranges is read up to there."""
    try:
        file.seek(to)
    except ValueError:
        while (left := to - file.tell()) > 0 and file.read(min(left, _PART_BYTES)):
            pass


def _header(file: Any, size: int | None, place: str) -> dict[str, StoredTensor]:
    length = int.from_bytes(file.read(8), "little")
    if size is None:
        raise InvalidArgumentError(f"{place} cannot be read: its server does not tell the size")
    if length > min(size - 8, HEADER_BYTES):
        raise InvalidArgumentError(f"{place} is not a safetensors file: its header is truncated")
    text = b""
    while len(text) < length and (part := file.read(length - len(text))):
        text += part
    return parse_header(text, size, place)


def _place(fs: Any, root: str, tensor: str) -> str:
    """Return the file that holds the tensor: `root`, or a file of the folder `root`."""
    if _name(root).endswith(".safetensors"):
        return root
    if _is_file(fs, f"{root}/{WEIGHTS}"):
        return f"{root}/{WEIGHTS}"
    files = _index(fs, root)
    if tensor not in files:
        similar = difflib.get_close_matches(tensor, files, LIKELY, 0.3) or list(files)[:LIKELY]
        where = f"{root}/{INDEX}"
        raise NotFoundError(f"{where} has no tensor {tensor}; it has {', '.join(similar)}")
    return _part(fs, root, files[tensor])


def _part(fs: Any, root: str, name: str) -> str:
    """Return the place of a file that the index names, or raise NotFoundError."""
    if not _is_file(fs, f"{root}/{name}"):
        raise NotFoundError(f"{root} lacks {name}, which {INDEX} names")
    return f"{root}/{name}"


def _index(fs: Any, root: str) -> dict[str, str]:
    """Read the file name of each tensor from the index in the folder `root`."""
    place = f"{root}/{INDEX}"
    try:
        text = fs.cat_file(place)
    except (FileNotFoundError, NotADirectoryError):
        need = f"no .safetensors file, nor a folder with {WEIGHTS} or {INDEX}"
        raise NotFoundError(f"{root} is {need}") from None
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{place} is not JSON: {error}") from None
    return parse_index(index, place)


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http:", "https:")):
        import aiohttp

        # Its default ends every download after five minutes.
        timeout = aiohttp.ClientTimeout(sock_connect=_SECONDS, sock_read=_SECONDS)
        options = {"client_kwargs": {"timeout": timeout}}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ValueError as error:  # such as an unknown protocol
        raise InvalidArgumentError(f"{url} cannot be read: {error}") from None


@contextmanager
def _store_errors(url: str) -> Iterator[None]:
    """Map errors of the object store to errors of Tolhouse."""
    try:
        yield
    except ImportError as error:  # the package of a protocol is missing
        if error.name == "fsspec":
            raise
        package = getattr(error.__cause__ or error, "name", None)
        advice = f"the package {package} is not installed: pip install {package}"
        raise InvalidArgumentError(
            f"{url} cannot be read: {advice if package else error}"
        ) from None
    except FileNotFoundError as error:
        if not _is_missing(error):
            raise UnavailableError(f"{url} cannot be read: {error.__cause__}") from None
        raise NotFoundError(f"{url}: there is no file {error}") from None
    except PermissionError as error:
        raise InvalidArgumentError(f"{url} cannot be read: {error}") from None
    except TimeoutError:
        raise UnavailableError(f"{url} cannot be read: its server did not answer") from None
    except ConnectionError as error:
        raise UnavailableError(f"{url} cannot be read: {error}") from None
    except (TolhouseError, OSError):  # such as a full disk
        raise
    except Exception as error:  # noqa: BLE001 - each object store has classes of its own
        reason = f"{type(error).__name__}: {error}"
        raise UnavailableError(f"{url} cannot be read: {reason}") from None
