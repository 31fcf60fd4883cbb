"""The house rules that a machine can check: who imports whom, how long things get, what never appears."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nanoinfer"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SHIPPED = [
    *SOURCES,
    *(ROOT / name for name in ("bench.py", "example.py", "setup.py")),
    *(ROOT / "examples").glob("*.py"),
]

# A module may import from its own floor and from those below; leaves may be imported by all.
FLOORS = ["leaf", "reference", "ops", "layers", "models", "loader", "engine", "top"]
LEAVES = {
    "batch", "config", "engine_config", "sampling_params", "inputs", "outputs", "errors", "options", "row_state",
    "tiles", "utils.parallel", "utils.interrupts", "utils.memory", "utils.json_fields", "utils.tokenizer", "utils.hub",
    "utils.checkpoint", "utils.staging", "utils.chat", "utils.detokenizer", "utils.stop_strings",
}  # fmt: skip
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "cloudpickle", "dill"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load"}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def floor(module: str) -> int:
    if module in LEAVES:
        return 0
    if module in ("reference", "ops"):
        return FLOORS.index(module)
    if module == "utils.loader":
        return FLOORS.index("loader")
    package = module.split(".")[0]
    return FLOORS.index(package) if package in FLOORS else FLOORS.index("top")


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports when it runs; imports for type checkers alone do not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in skipped:
            names = [alias.name for alias in node.names if alias.name.startswith("nanoinfer")]
            found |= {name.removeprefix("nanoinfer").removeprefix(".") for name in names}
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped and (node.module or "").startswith("nanoinfer"):
            base = node.module.removeprefix("nanoinfer").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                is_module = (PACKAGE / f"{inner.replace('.', '/')}.py").exists()
                found.add(inner if is_module else base)
    return found - {""}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    """engine -> models -> layers -> ops: a lower floor that knew a higher one could not be read, or tested, alone."""
    own = module_name(path)
    up = {module for module in imported_modules(path) if floor(module) > floor(own)}
    assert not up, f"{own} imports from above: {up}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_and_functions_stay_small(path: Path) -> None:
    """No file over 400 lines, no function over 60."""
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name}: {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_device_branches_stand_in_two_files(path: Path) -> None:
    """Elsewhere the dispatcher chooses: a comparison with "cuda" or "cpu" marks a second path to keep in step."""
    if module_name(path) not in ("engine.model_runner", "engine.cuda_graph", "check") and "bench" not in path.parts:
        check_device_branches(path)


def check_device_branches(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        text = ast.unparse(node) if isinstance(node, (ast.Compare, ast.Attribute)) else ""
        if isinstance(node, ast.Compare):
            asks_device = re.search(r"""device\.type [=!]=|[=!]= ['"](cuda|cpu)['"]""", text)
            # A user's own choice may be refused; it is not a second path.
            assert not asks_device or "self.device" in text, f"line {node.lineno}: {text}"
        assert not text.endswith((".is_cuda", ".is_cpu")), f"line {node.lineno}: {text}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_code_from_data(path: Path) -> None:
    """No pickle, eval or torch.load, and trust_remote_code only to refuse it: a model folder is data."""
    if not path.exists():
        pytest.fail(f"{path.name} is part of the project and missing")
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        assert not FORBIDDEN_IMPORTS.intersection(names), f"line {node.lineno} imports {names}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.startswith("Auto") and called.endswith(".from_pretrained"):
                refused = any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
                assert refused, f"line {node.lineno} does not refuse remote code"
            assert called not in FORBIDDEN_CALLS, f"line {node.lineno} calls {called}"
            for keyword in node.keywords:
                trusting = keyword.arg == "trust_remote_code" and not _is_false(keyword.value)
                assert not trusting, f"line {node.lineno} trusts remote code"


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_the_checks_see_what_they_forbid(tmp_path: Path) -> None:
    """A lint that cannot fail protects nothing."""
    bad = tmp_path / "bad.py"
    bad.write_text("import pickle\n")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_nothing_runs_code_from_data(bad)
    bad.write_text("torch.load(path)\n")
    with pytest.raises(AssertionError):
        test_nothing_runs_code_from_data(bad)
    bad.write_text("AutoTokenizer.from_pretrained(path)\n")
    with pytest.raises(AssertionError):
        test_nothing_runs_code_from_data(bad)
    for line in ("x.device.type == 'cuda'", "device == 'cuda'", "if x.is_cuda: pass"):
        bad.write_text(line)
        with pytest.raises(AssertionError):
            check_device_branches(bad)
    bad.write_text("import nanoinfer.engine.llm\nfrom nanoinfer.engine import scheduler\n")
    assert imported_modules(bad) == {"engine.llm", "engine.scheduler"}
    assert floor("ops") < floor("layers.linear") < floor("models.qwen2") < floor("engine.llm") < floor("check")
