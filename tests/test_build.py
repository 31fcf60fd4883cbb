"""The extension: what it may link, that every instruction set computes the same, what setup.py does and refuses."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution

ROOT = Path(__file__).parent.parent
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "nanoinfer"]
ISAS = ["plain", "avx2", "avx512", "avx512_amx"]
# Tests that the instruction set has no part in, or that repeat at length what shorter ones see.
NOT_FOR_ISAS = (
    "not (refused or torchs_rules or prepare_batch or 151936 or draws_follow or successive or ties_stay"
    " or opcheck or any_step or any_size or qwen2_7b)"
)

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")


def extension() -> ModuleType:
    return pytest.importorskip("nanoinfer._C", reason="the extension is not built")


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run Python with more environment variables; its output is text, errors included."""
    environment = os.environ | {"PYTHONPATH": str(cwd)} | environment
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["setup_py"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The project's sources without anything that was built."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.safetensors")
            )
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


@needs_nm
def test_only_the_stable_abi_is_linked() -> None:
    """One file serves every torch: no C++ symbol of libtorch, and of Python the limited API alone."""
    listed = subprocess.run(
        ["nm", "-DC", "-u", extension().__file__], capture_output=True, text=True, check=True
    ).stdout
    undefined = [line.split(maxsplit=1)[1] for line in listed.splitlines()]
    assert any(symbol.startswith("torch_") for symbol in undefined)
    unstable = [symbol for symbol in undefined if "c10::" in symbol or "at::" in symbol or "torch::" in symbol]
    assert not unstable


@needs_compiler
@needs_nm
def test_kernels_share_nothing_with_other_files(setup_py: ModuleType, tmp_path: Path) -> None:
    """A function that isa.cpp, compiled with AVX-512, shared with other files could run on machines without it:
    whatever it defines, before any inlining, lies in its instruction set's namespace."""
    target, flags = tmp_path / "isa.o", [*setup_py.COMMON, *setup_py.CXX_FLAGS, *setup_py.isa_flags("avx512"), "-O0"]
    subprocess.run(["g++", *flags, "-c", "csrc/cpu/isa.cpp", "-o", str(target)], cwd=ROOT, check=True)
    listed = subprocess.run(
        ["nm", "-C", "--defined-only", str(target)], capture_output=True, text=True, check=True
    ).stdout
    shared = [line for line in listed.splitlines() if line.split()[1] in "WVTDBRu" and "::avx512::" not in line]
    assert not shared


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    """The kernels' tests pass with each table of kernels that this machine can run."""
    if isa not in extension().cpu_isas():
        pytest.skip(f"this machine has no {isa}")
    if isa == extension().cpu_isa():
        pytest.skip("this is what all other tests run with")
    files = [f"tests/test_{name}.py" for name in ("attention", "ops", "sample", "thin_linear")]
    done = python("-m", "pytest", "-x", "-q", "-k", NOT_FOR_ISAS, *files, NANOINFER_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_unknown_instruction_set_is_refused() -> None:
    """A typing error in NANOINFER_CPU_ISA must not quietly run something else."""
    extension()
    done = python("-c", "import nanoinfer.ops", NANOINFER_CPU_ISA="avx9")
    assert done.returncode == 1
    assert "NANOINFER_CPU_ISA is 'avx9', but this machine supports: plain" in done.stdout


def test_check_reports_and_passes() -> None:
    """`python -m nanoinfer check` names versions and kernels, and finds nothing wrong."""
    done = python("-m", "nanoinfer", "check")
    assert done.returncode == 0, done.stdout
    for text in ("torch ", extension().cpu_isa(), "rms_norm", "ok: fp32 bf16 fp16"):
        assert text in done.stdout
    cells = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    assert cells["tile_linear"].strip().startswith("none needed")  # it is for GPUs


def test_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A self-test that cannot fail tests nothing."""
    from nanoinfer import check, ops

    right = ops.silu_and_mul
    monkeypatch.setattr(ops, "silu_and_mul", lambda x: right(x) * 1.02)
    assert check.main() == 1
    assert "silu_and_mul on cpu in bf16: the result:" in capsys.readouterr().out


def test_runs_without_the_extension(checkout: Path) -> None:
    """Nothing built: every op runs on plain torch, and one line says so."""
    # Without an editable install's finder, which would lend its own extension to this copy.
    code = (
        "import runpy, sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
        "sys.argv[1:] = ['check']; runpy.run_module('nanoinfer', run_name='__main__')"
    )
    done = python("-c", code, cwd=checkout)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("nanoinfer runs on plain torch, slowly: the extension is not built") == 1
    assert "compiled" not in done.stdout


def test_no_compiler_is_said_and_no_error(checkout: Path) -> None:
    """Who has no compiler gets the package all the same, and hears what to do."""
    done = python("setup.py", "build_ext", "--inplace", cwd=checkout, PATH="/nowhere", CXX="")
    assert done.returncode == 0, done.stdout
    assert "no C++ compiler found, so it will run on plain torch, slowly; install one" in done.stdout
    assert not list(checkout.rglob("*.so"))


def test_editable_installs_share_their_objects(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each of them compiles everything: setuptools names a new folder for each."""
    monkeypatch.chdir(ROOT)
    command = setup_py.BuildKernels(Distribution())
    command.editable_mode, command.build_temp = True, "/new"
    command.finalize_options()
    assert command.build_temp == "build/editable"


def test_one_wheel_serves_every_python(checkout: Path) -> None:
    """The wheel's tag says CPython 3.10 and later, and the demo model travels in it."""
    done = python("setup.py", "bdist_wheel", cwd=checkout, PATH="/nowhere", CXX="")
    assert done.returncode == 0, done.stdout
    (wheel,) = (checkout / "dist").iterdir()
    assert "-cp310-abi3-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"nanoinfer/py.typed", "nanoinfer/ops.py", "nanoinfer/assets/demo/config.json"} <= names


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "false"}, "false failed with exit code 1"),
        ({"CXX": "no-such-compiler"}, "there is no compiler 'no-such-compiler'; set CXX to one"),
        ({"NANOINFER_CUDA": "yes"}, "NANOINFER_CUDA must be 0, 1 or unset, got 'yes'"),
        ({"NANOINFER_CUDA": "1", "CUDA_HOME": "/nowhere"}, "NANOINFER_CUDA=1, but nvcc is neither"),
    ],
)
def test_a_build_that_fails_is_an_error(checkout: Path, environment: dict[str, str], message: str) -> None:
    """A compiler that rejects the sources, or a switch that cannot be obeyed, must not end in a slow package."""
    done = python("setup.py", "build_ext", "--inplace", cwd=checkout, **environment)
    assert done.returncode != 0
    assert message in done.stdout


@needs_compiler
def test_only_what_changed_is_compiled(setup_py: ModuleType, tmp_path: Path) -> None:
    """An object is fresh until its source, a header, or its flags change."""
    source, header = tmp_path / "a b.cpp", tmp_path / "header.h"
    header.write_text("#define ANSWER 42\n")
    source.write_text('#include "header.h"\nint answer = ANSWER;\n')
    job = setup_py.compile_job(["g++"], source, tmp_path / "objects" / "a.o")
    assert not job.is_fresh()
    job.run()
    assert job.is_fresh()
    assert not setup_py.compile_job(["g++", "-O1"], source, tmp_path / "objects" / "a.o").is_fresh()
    for changed in (source, header):
        os.utime(changed, (job.target.stat().st_mtime + 10,) * 2)
        assert not job.is_fresh()
        os.utime(changed, (0, 0))
        assert job.is_fresh()
    header.unlink()
    assert not job.is_fresh()


def make_nvcc(tmp_path: Path, *archs: str) -> str:
    """A stand-in for nvcc that says which architectures it knows."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n" + "".join(f"echo sm_{arch}\n" for arch in archs))
    nvcc.chmod(0o755)
    return str(nvcc)


def test_architectures(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TORCH_CUDA_ARCH_LIST, else the visible GPUs, else the wheels' list as far as this nvcc goes."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(setup_py, "visible_archs", list)
    new = make_nvcc(tmp_path, "80", "86", "89", "90", "120")
    assert setup_py.arch_flags(new)[-1] == "-gencode=arch=compute_90a,code=sm_90a"
    assert "-gencode=arch=compute_89,code=compute_89" in setup_py.arch_flags(new)
    monkeypatch.setattr(setup_py, "visible_archs", lambda: ["12.0a"])
    assert setup_py.arch_flags(new) == ["-gencode=arch=compute_120a,code=sm_120a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a+PTX")
    assert setup_py.arch_flags(new) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    old = make_nvcc(tmp_path, "80", "86")
    with pytest.raises(SystemExit, match=r"does not support CUDA architecture 9.0a\+PTX"):
        setup_py.arch_flags(old)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(setup_py, "visible_archs", list)
    assert setup_py.arch_flags(old) == ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_86,code=sm_86"]
