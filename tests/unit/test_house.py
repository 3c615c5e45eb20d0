"""Architecture rules: imports between parts, packages of extras, encodings, generated code."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import tolhouse
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tolhouse import errors
from tolhouse.extras import EXTRAS

ROOT = Path(__file__).parent.parent.parent
SOURCES = ROOT / "services" / "tolhouse"

# layers from the bottom up; a part may import lower layers and its neighbours in NEIGHBOURS
LAYERS = (
    {"v1", "errors", "extras", "logs"},
    {"files", "sampling", "validation"},
    {"certs", "table"},
    {"net", "tracing"},
    {"config", "model"},
    {"store", "train", "sources"},
    {"client"},
    {"analysis"},
    {"lookup", "build", "engine"},
    {"worker", "gateway", "integrations"},
    {"testing"},
    {"demo"},
    {"cli"},
)
NEIGHBOURS = {("logs", "errors")}
LAYER_OF = {part: number for number, layer in enumerate(LAYERS) for part in layer}


def part_of(path: Path) -> str:
    return path.relative_to(SOURCES).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [
        p
        for p in sorted(SOURCES.rglob("*.py"))
        if "v1" not in p.relative_to(SOURCES).parts and p != SOURCES / "__init__.py"
    ]


def imports(path: Path) -> set[str]:
    """Return the full names of all imports of a file, including those inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "tolhouse"
                else {str(node.module)}
            )
    return found


def imported_parts(path: Path) -> set[str]:
    parts = {name.split(".")[1] for name in imports(path) if name.startswith("tolhouse.")}
    return {part for part in parts if part in LAYER_OF} - {part_of(path)}


def test_every_part_has_a_layer() -> None:
    """Every part of the package belongs to a layer."""
    assert set(LAYER_OF) == {part_of(p) for p in modules()} | {"v1"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCES)))
def test_nothing_imports_upwards_or_sideways(path: Path) -> None:
    """A part imports only parts of lower layers, and services never import each other."""
    mine = part_of(path)
    wrong = {
        other
        for other in imported_parts(path)
        if LAYER_OF[other] >= LAYER_OF[mine] and (mine, other) not in NEIGHBOURS
    }
    assert set() == wrong


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        (
            "redis",
            {
                "store/redis.py",
                "store/redis_connection.py",
                "store/redis_layouts.py",
                "store/redis_reads.py",
                "testing.py",
            },
        ),
        ("ray", {"build/job.py"}),
        ("pickle", set()),
        (
            "fastapi",
            {f"gateway/{name}.py" for name in ("app", "error_responses", "routes")},
        ),
        ("jinja2", {"gateway/templates.py", "analysis/report.py"}),
        ("trustme", {"certs.py"}),
    ],
)
def test_a_package_is_imported_in_one_place(package: str, allowed: set[str]) -> None:
    """Redis, Ray, HTTP and templates are each imported in one place, and pickle nowhere."""
    importers = {
        p.relative_to(SOURCES).as_posix()
        for p in modules()
        if any(n.split(".")[0] == package for n in imports(p))
    }
    assert allowed == importers


def test_only_config_reads_the_environment() -> None:
    """Only config mentions os.environ or getenv."""
    readers = {
        p.relative_to(SOURCES).as_posix()
        for p in modules()
        if re.search(r"environ\b|getenv", p.read_text(encoding="utf-8"))
    }
    # gRPC's own variable, which must be set before gRPC starts
    assert {"config.py", "net/channel.py"} == readers


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("tolhouse", ("torch", "ray", "redis", "fastapi", "tokenizers", "safetensors")),
        ("tolhouse.cli", ("torch", "ray", "redis", "fastapi", "tokenizers")),
        ("tolhouse.table.manifest", ("torch", "ray", "redis")),
        ("tolhouse.lookup.service", ("torch", "ray", "fastapi", "tokenizers")),
        ("tolhouse.worker.run", ("ray", "redis", "fastapi")),
        ("tolhouse.gateway.app", ("torch", "ray", "redis")),
        ("tolhouse.build.job", ("fastapi",)),
    ],
)
def test_a_part_imports_only_its_own_libraries(module: str, absent: tuple[str, ...]) -> None:
    """In a clean process, a part does not import the libraries of other parts."""
    code = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert "" == answer.stdout.strip()


def packages(module: str) -> set[str]:
    """Return the third-party packages that a module imports, directly or indirectly."""
    found, seen, left = set[str](), set[Path](), [module]
    while left:
        name = left.pop()
        if name.partition(".")[0] != "tolhouse":
            found.add(name.partition(".")[0])
            continue
        path = SOURCES.parent / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path.is_file() and path not in seen:
            seen.add(path)
            left += imports(path)
    return found - sys.stdlib_module_names


def installed_with(extra: str) -> set[str]:
    """Return the packages that `pip install tolhouse[EXTRA]` installs, with their dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found, left = set[str](), [Requirement(f"tolhouse[{extra}]")]
    while left:
        wanted = left.pop()
        if str(wanted) in found:
            continue
        found |= {str(wanted), canonicalize_name(wanted.name)}
        if wanted.name == "tolhouse":
            texts = project["dependencies"]
            texts = sum((project["optional-dependencies"][e] for e in wanted.extras), texts)
            left += map(Requirement, texts)
            continue
        needed = map(Requirement, requires(wanted.name) or ())
        extras = wanted.extras or {""}
        left += [
            n
            for n in needed
            if not n.marker or any(n.marker.evaluate({"extra": e}) for e in extras)
        ]
    return found


@pytest.mark.parametrize(
    ("extra", "module"),
    [
        ("lookup", "tolhouse.lookup.service"),
        ("worker", "tolhouse.worker.run"),
        ("worker", "tolhouse.engine.cpu.compiled"),
        ("gateway", "tolhouse.gateway.app"),
        ("build", "tolhouse.build.job"),
        ("build", "tolhouse.build.compress"),
        ("train", "tolhouse.train.trainer"),
        ("train", "tolhouse.analysis.report"),
        ("certs", "tolhouse.certs"),
        ("transformers", "tolhouse.integrations.attach"),
    ],
)
def test_an_extra_installs_all_imports_of_its_part(extra: str, module: str) -> None:
    """An extra installs every package that its part imports, including lazy imports."""
    needed, installed, providers = packages(module), installed_with(extra), packages_distributions()
    needed -= {"triton"}  # comes with builds of torch for GPUs
    if extra == "gateway":  # the gateway has no gRPC server
        needed -= {"grpc_health", "grpc_reflection"}
    if extra == "transformers":  # the SDK traces only if this package is installed
        needed -= {"opentelemetry"}
    assert needed
    assert set() == {
        p for p in needed if installed.isdisjoint(map(canonicalize_name, providers[p]))
    }


def test_hints_name_extras_that_install_the_package() -> None:
    """EXTRAS lists exactly the extras that install a package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].keys() - {"all", "dev", "docs"}
    own = {
        extra: {r.partition(">")[0] for r in project["optional-dependencies"][extra]}
        for extra in extras
    }
    providers = packages_distributions()
    for package, listed in EXTRAS.items():
        names = set(map(canonicalize_name, providers[package]))
        assert {extra for extra in extras if names & own[extra]} <= set(listed)
        assert all(names & installed_with(extra) for extra in listed)


@pytest.mark.parametrize(
    ("line", "package", "extra"),
    [
        ("lookup", "prometheus_client", "lookup"),
        ("worker m", "torch", "worker"),
        ("worker m", "prometheus_client", "worker"),
        ("compile m", "torch", "worker"),
        ("gateway m", "tokenizers", "gateway"),
        ("gateway m", "jinja2", "gateway"),
        ("gateway m", "uvicorn", "gateway"),
        ("keys list f", "starlette", "gateway"),
        ("build m", "torch", "build"),
        ("build m", "tqdm", "build"),
        ("compress m", "tqdm", "build"),
        ("train tiny", "torch", "train"),
        ("train tiny", "tqdm", "train"),
        ("eval m", "tqdm", "train"),
        ("explain m text", "torch", "train"),
        ("generate m text", "tokenizers", "model"),
        ("certs f", "trustme", "certs"),
        ("demo", "torch", "all"),
        ("serve", "torch", "all"),
        ("tables list --store redis://127.0.0.1:9", "redis", "store"),
        ("fetch t 1 --rows redis://127.0.0.1:9", "hiredis", "store"),
    ],
)
def test_a_command_without_its_packages_names_its_extra(
    line: str, package: str, extra: str, tmp_path: Path
) -> None:
    """The error for a missing package is one line with the install command."""
    code = f"import sys; sys.modules[{package!r}] = None; from tolhouse.cli import main; main()"
    command = [sys.executable, "-c", code, *line.split()]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, encoding="utf-8"
    )
    hint = f"the package {package} is not installed: pip install 'tolhouse[{extra}]'"
    assert (1, f"error: {hint}\n") == (done.returncode, done.stderr)


def test_the_sdk_needs_few_packages() -> None:
    """The bare package has six dependencies, and the extra of each command installs click."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    assert {"grpcio", "ml-dtypes", "numpy", "protobuf", "pydantic", "xxhash"} == names
    for extra in ("cli", "lookup", "worker", "gateway", "build", "train", "certs"):
        assert "click" in installed_with(extra), extra


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from tolhouse import Client; Client('127.0.0.1:1'); print('ok')", "ok"),
        ("from tolhouse import Client; Client('redis://127.0.0.1:1').tables()", "tolhouse[store]"),
        ("from tolhouse.cli import main", "tolhouse[cli]"),
    ],
)
def test_the_sdk_works_without_optional_packages(code: str, expected: str) -> None:
    """Only code that needs a missing package fails, and the error names its extra."""
    absent = ("click", "opentelemetry", "redis", "hiredis", "torch", "ray", "prometheus_client")
    block = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); {code}"
    command = [sys.executable, "-c", block]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert expected in done.stdout + done.stderr


def without_encoding(call: ast.Call) -> bool:
    """Return whether a call reads or writes text in the locale's encoding."""
    method, options = isinstance(call.func, ast.Attribute), {option.arg for option in call.keywords}
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    texts = [
        a.value for a in (*call.args, *(o.value for o in call.keywords)) if hasattr(a, "value")
    ]
    if name in ("run", "Popen", "check_output"):
        return "text" in options and "encoding" not in options
    opens = name in ("TextIOWrapper", "NamedTemporaryFile" if "w" in texts else "fdopen")
    opens |= name in ("read_text", "write_text") and method
    opens |= name == "open" and (not method or not call.args or texts[:1] in (["w"], ["r"], ["a"]))
    binary = {"rb", "wb", "ab", "r+b"} & {*map(str, texts)}
    return opens and not binary and options.isdisjoint(("encoding", "fileobj"))


@pytest.mark.parametrize("folder", ["services", "tests", "loadtest"])
def test_text_has_an_encoding(folder: str) -> None:
    """Each call that opens text sets an encoding."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and without_encoding(node)
    ]
    assert [] == found


def test_the_public_names_are_clients_results_and_errors() -> None:
    """`tolhouse` exports both clients, their arguments and results, and all errors."""
    tree = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.TolhouseError)
    }
    names = set(tolhouse.__all__)
    clients = {"AsyncClient", "Client", "ClientCredentials", "__version__"}
    results = {
        "GenerateOutput",
        "Manifest",
        "RowCounts",
        "TableInfo",
        "TokenLogprobs",
        "WorkerInfo",
    }
    assert clients | results | tree == names
    assert sorted(tolhouse.__all__) == tolhouse.__all__
    assert names <= set(dir(tolhouse))


def test_the_generated_code_is_current(tmp_path: Path) -> None:
    """services/tolhouse/v1 equals the output of `make protos`."""
    protos = sorted((ROOT / "protos" / "tolhouse" / "v1").glob("*.proto"))
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{ROOT / 'protos'}",
            *out,
            *map(str, protos),
        ],
        check=True,
    )
    fresh = {
        p.name: p.read_text(encoding="utf-8") for p in (tmp_path / "tolhouse" / "v1").iterdir()
    }
    committed = {
        p.name: p.read_text(encoding="utf-8")
        for p in (SOURCES / "v1").glob("*_pb2*")
        if p.is_file()
    }
    assert fresh == committed


def test_readme_names_every_file() -> None:
    """The tree in docs/architecture.md has a line for each file and folder of the package."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = {p.name for p in modules() if p.name != "__init__.py"} | {
        p.name for p in SOURCES.iterdir() if p.is_dir() and p.name != "__pycache__"
    }
    assert set() == {name for name in names if name not in page}


def test_the_generated_code_runs_with_the_oldest_versions_allowed() -> None:
    """The lower bounds of grpcio and protobuf are the versions that the generated code requires."""
    grpc = (SOURCES / "v1" / "lookup_pb2_grpc.py").read_text(encoding="utf-8")
    protobuf = (SOURCES / "v1" / "lookup_pb2.py").read_text(encoding="utf-8")
    needed = {
        "grpcio": re.findall(r"GRPC_GENERATED_VERSION = '(.+)'", grpc)[0],
        "protobuf": ".".join(re.findall(r"^    (\d+),$", protobuf, re.MULTILINE)),
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    assert {name: str(found[name]) for name in needed} == {
        name: f">={version}" for name, version in needed.items()
    }
