"""What MkDocs does not do by itself, for the pages in this folder.

The pages of `INCLUDED` get the content of a file of the repository. The comment
`<!-- options CLASS -->` stands for the options of a class of `tolhouse.config`, `<!-- sampling -->`
for the sampling parameters, `<!-- errors -->` for the error classes, and `<!-- api -->` for the
reference of all other public names. Links out of this folder become links to the repository.
"""

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "services"))

import tolhouse  # noqa: E402 - from the sources beside this folder
from tolhouse import config, errors, sampling  # noqa: E402 - from the sources beside this folder

INCLUDED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "DECISIONS.md": "decisions.md",
    "SCIENCE.md": "science.md",
    "SECURITY.md": "security.md",
    "deploy/k8s/README.md": "kubernetes.md",
    "README.md": "index.md",
}
PLOTS = "loadtest/science/plots"
_MANIFEST = "ref, codec, num_blocks, layers, has_x0, num_records, record_bytes, table_bytes"
MEMBERS = {
    "ClientCredentials": "\n    options: {members: []}",
    "Manifest": f"\n    options: {{members: [{_MANIFEST}]}}",
}
_LINK = re.compile(r"(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s#]+)?(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the plots of SCIENCE.md."""
    for plot in sorted((ROOT / PLOTS).glob("*.png")):
        files.append(File.generated(config, f"images/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in included files and generated tables, and let links lead out of this folder."""
    included = {target: path for path, target in INCLUDED.items()}
    path = included.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    source = posixpath.dirname(path)
    if source != "docs":
        markdown = (ROOT / path).read_text(encoding="utf-8")
    markdown = re.sub(r"^<!-- options (\w+) -->$", _options, markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^<!-- sampling -->$", lambda _: _sampling(), markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^<!-- errors -->$", lambda _: _errors(), markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^<!-- api -->$", lambda _: _api(), markdown, flags=re.MULTILINE)
    url = config.repo_url

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2] or "", match[3] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(source, target))
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri} links to {path}, which does not exist")
        if path in INCLUDED:
            target = INCLUDED[path]
        elif path.startswith("docs/"):
            target = path.removeprefix("docs/")
        elif path.startswith(PLOTS):
            target = f"images/{posixpath.basename(path)}"
        else:
            target = f"{url}/blob/main/{path}"
        return f"{label}({target}{anchor})"

    parts = _FENCE.split(markdown)
    return "".join(p if n % 2 else _LINK.sub(link, p) for n, p in enumerate(parts))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Fail if a page loads anything from another host."""
    loads = r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(https?:)?//|<link[^>]*stylesheet[^>]*//"
    if found := re.search(loads, output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {found[0]}")
    return output


def _table(head: str, rows: Iterator[tuple[str, ...]]) -> str:
    names = head.split(",")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _options(match: re.Match[str]) -> str:
    """The options of a class; those of its bases have tables of their own."""
    cls = getattr(config, match[1])
    inherited = {
        name: field.description
        for base in (config.Server, config.Caller)
        if cls is not base and issubclass(cls, base)
        for name, field in base.model_fields.items()
    }

    def rows() -> Iterator[tuple[str, ...]]:
        for name, field in cls.model_fields.items():
            if inherited.get(name) == field.description:
                continue
            prefix = getattr(cls, "prefix", "…")
            variable = f"{config.PREFIX}{prefix}_{name.strip('_').upper()}"
            text = f"{field.description}{_allowed(field)}"
            shown = name if cls is config.VLLMConfig else config.flag(name)
            names = f"`{shown}`<br>`{variable}`"
            yield names, _default(field.default), _cell(text)

    return _table("Option and environment variable,Default,Description", rows())


def _sampling() -> str:
    fields = sampling.SamplingParams.model_fields.items()
    rows = (
        (f"`{n}`", _default(f.default), _cell(f"{f.description}{_allowed(f)}")) for n, f in fields
    )
    return _table("Parameter,Default,Description", rows)


def _errors() -> str:
    """Every error class with its statuses, depth first."""

    def rows(cls: type) -> Iterator[tuple[str, ...]]:
        bases = [b.__name__ for b in cls.__bases__ if b is not Exception]
        text = _cell((cls.__doc__ or "").split("\n\n")[0])
        statuses = f"`{cls.grpc_status}`", str(cls.http_status)
        yield f"`{cls.__name__}`", ", ".join(f"`{b}`" for b in bases), *statuses, text
        for child in cls.__subclasses__():
            yield from rows(child)

    return _table("Class,Bases,gRPC,HTTP,Raised when", rows(errors.TolhouseError))


def _api() -> str:
    """What mkdocstrings is to document: every public name that is not an error."""
    public = {name: getattr(tolhouse, name) for name in sorted(tolhouse.__all__)}
    return "\n\n".join(
        f"::: tolhouse.{name}{MEMBERS.get(name, '')}"
        for name, value in public.items()
        if isinstance(value, type) and not issubclass(value, errors.TolhouseError)
    )


def _allowed(field: Any) -> str:
    """The bounds of a field, or the values that it takes, as a sentence."""
    if get_origin(field.annotation) is Literal:
        return f" One of {', '.join(f'`{value}`' for value in get_args(field.annotation))}."
    found = {n: getattr(m, n) for m in field.metadata for n in _BOUNDS if hasattr(m, n)}
    return f" {' and '.join(_BOUNDS[n].format(v) for n, v in found.items()).capitalize()}." * bool(
        found
    )


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`" if value not in ("", None, (), {}) else ""


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
