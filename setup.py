"""Builds nanoinfer._C: the CPU kernels, and the CUDA kernels where there is a toolkit. Metadata is in pyproject.toml.

Environment: NANOINFER_CUDA=1 wants the CUDA kernels, 0 refuses them; unset, they are built where torch is a CUDA build
and nvcc is found. TORCH_CUDA_ARCH_LIST ("8.0;9.0a"), CUDA_HOME, CXX, MAX_JOBS and NVCC_THREADS as elsewhere.

One file serves every torch >= 2.11 and CPython >= 3.10: only the stable ABI of both is used. Hence no
torch.utils.cpp_extension, which links what is not stable and refuses CUDA where torch is a CPU build.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
DEFINES = ["-DPy_LIMITED_API=0x030a0000", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
COMMON = ["-std=c++20", "-O3", *DEFINES, "-I", str(CSRC)]
# Strict arithmetic (what the source says is what runs) except that nobody reads errno or floating-point traps.
CXX_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-ffp-contract=off", "-fno-math-errno",
             "-fno-trapping-math"]  # fmt: skip

# csrc/cpu/isa.cpp is compiled once for each of these; csrc/cpu/kernels.cpp picks among them when the library loads.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# gcc 12 calls what its own AVX-512 header leaves uninitialised on purpose a mistake; clang does not know
# the first warning.
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512",
          "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-warning-option"]  # fmt: skip
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
X86_ISAS = {"plain": [], "avx2": AVX2, "avx512": AVX512, "avx512_amx": AMX}

# For wheels: from Ampere to Hopper, and PTX for what comes after.
WHEEL_ARCHS = ["8.0", "8.6", "8.9+PTX", "9.0a"]


@dataclass(frozen=True)
class Job:
    """One object file and the command that makes it."""

    target: Path
    command: list[str]

    @property
    def stamp(self) -> Path:
        return self.target.with_suffix(".cmd")

    @property
    def deps(self) -> Path:
        return self.target.with_suffix(".d")

    def is_fresh(self) -> bool:
        """Made by this very command from sources and headers that have not changed since."""
        if not (self.target.exists() and self.stamp.exists() and self.deps.exists()):
            return False
        rule = self.deps.read_text().replace("\\\n", " ").split(":", 1)[1]
        made = self.target.stat().st_mtime
        sources = map(Path, shlex.split(rule))
        unchanged = all(source.exists() and source.stat().st_mtime <= made for source in sources)
        return unchanged and self.stamp.read_text() == shlex.join(self.command)

    def run(self) -> None:
        if self.is_fresh():
            return
        self.stamp.unlink(missing_ok=True)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        run(self.command)
        self.stamp.write_text(shlex.join(self.command))


def run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    if shutil.which(command[0]) is None:
        sys.exit(f"nanoinfer: there is no compiler {command[0]!r}; set CXX to one, or unset it to use the one on PATH")
    code = subprocess.run(command).returncode
    if code:
        sys.exit(f"nanoinfer: {command[0]} failed with exit code {code}; its messages are above")


def compile_job(compiler: list[str], source: Path, target: Path) -> Job:
    deps = str(target.with_suffix(".d"))
    return Job(target, [*compiler, "-MMD", "-MF", deps, "-c", str(source), "-o", str(target)])


def find_cxx() -> list[str] | None:
    """The C++ compiler: $CXX, or the first one on PATH."""
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    found = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    return [found] if found else None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def wanted_nvcc(cu_files: list[Path]) -> str | None:
    """The nvcc to compile the CUDA kernels with, or None where they are not wanted."""
    import torch

    switch, nvcc = os.environ.get("NANOINFER_CUDA", ""), find_nvcc()
    if switch not in ("", "0", "1"):
        sys.exit(f"nanoinfer: NANOINFER_CUDA must be 0, 1 or unset, got {switch!r}")
    if switch == "1" and not nvcc:
        sys.exit("nanoinfer: NANOINFER_CUDA=1, but nvcc is neither in CUDA_HOME/bin nor on PATH")
    wanted = switch == "1" or (switch == "" and torch.version.cuda is not None)
    return nvcc if wanted and cu_files else None


def supported_archs(nvcc: str) -> set[str]:
    """Architectures that this nvcc compiles for: {"80", "90", "90a", ...}."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    plain = set(re.findall(r"sm_(\d+a?)", listed))
    return plain | {f"{arch}a" for arch in plain if arch.isdigit() and int(arch) >= 90}


def visible_archs() -> list[str]:
    """Architectures of the GPUs of this machine; 9.0 and later with their own instructions ("9.0a")."""
    import torch

    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}.{minor}{'a' if major >= 9 else ''}" for major, minor in sorted(found)]


def arch_flags(nvcc: str) -> list[str]:
    """-gencode flags for TORCH_CUDA_ARCH_LIST, or the visible GPUs, or the wheels' list as far as nvcc knows it."""
    supported = supported_archs(nvcc)
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    archs = [arch for arch in named if arch] or visible_archs()
    archs = archs or [arch for arch in WHEEL_ARCHS if numeral(arch) in supported]
    flags = []
    for arch in archs:
        if numeral(arch) not in supported:
            sys.exit(f"nanoinfer: {nvcc} does not support CUDA architecture {arch}, only {sorted(supported)}")
        flags.append(f"-gencode=arch=compute_{numeral(arch)},code=sm_{numeral(arch)}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{numeral(arch)},code=compute_{numeral(arch)}")
    return flags


def numeral(arch: str) -> str:
    """ "9.0a+PTX" -> "90a"."""
    return arch.removesuffix("+PTX").replace(".", "")


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def isa_flags(isa: str) -> list[str]:
    """Flags of isa.cpp for one instruction set; no kernel throws."""
    return [f"-DNANOINFER_ISA={isa}", "-fno-exceptions", *(X86_ISAS[isa] if is_x86() else [])]


def cpp_jobs(cxx: list[str], temp: Path, includes: list[str]) -> list[Job]:
    """Every .cpp once, isa.cpp once for each instruction set."""
    isas = list(X86_ISAS) if is_x86() else ["plain"]
    units = [(source, source.stem, []) for source in sorted(CSRC.rglob("*.cpp")) if source.name != "isa.cpp"]
    units += [(CSRC / "cpu/isa.cpp", f"isa_{isa}", isa_flags(isa)) for isa in isas]
    return [
        compile_job([*cxx, *COMMON, *CXX_FLAGS, *includes, *flags], source, temp / source.parent / f"{name}.o")
        for source, name, flags in units
    ]


def cuda_jobs(nvcc: str, cxx: list[str], temp: Path, includes: list[str], cu_files: list[Path]) -> list[Job]:
    flags = [*arch_flags(nvcc), "-ccbin", cxx[-1], "-DUSE_CUDA", "--expt-relaxed-constexpr",
             "-Xcompiler=-fPIC,-fvisibility=hidden", f"--threads={os.environ.get('NVCC_THREADS') or 1}"]  # fmt: skip
    return [
        compile_job([nvcc, *COMMON, *flags, *includes], source, temp / source.with_suffix(".o")) for source in cu_files
    ]


def link(cxx: list[str], nvcc: str | None, objects: list[Path], torch_lib: Path, output: Path) -> None:
    """Link against torch by its C functions alone.

    --no-as-needed keeps the dependency on libtorch.so, which brings libtorch_cuda where torch has one; no rpath, as
    `import torch` has loaded them all by then. nvcc links the CUDA runtime in: nobody needs a toolkit at run time.
    """
    driver = [nvcc, "-ccbin", cxx[-1], "--cudart", "static", "-Xcompiler=-fPIC"] if nvcc else [*cxx, "-fPIC"]
    libraries = [f"-L{torch_lib}", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"]
    output.parent.mkdir(parents=True, exist_ok=True)
    run([*driver, "-shared", *map(str, objects), *libraries, "-o", str(output)])


class BuildKernels(build_ext):
    """Compiles what changed, in parallel, each source with its own flags, and links."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # in place of a folder that is new each time, so that only what changed is compiled
            self.build_temp = str(Path("build", "editable"))

    def run(self) -> None:
        if sys.platform != "linux":
            print(f"nanoinfer: kernels are built on Linux only, not on {sys.platform}, so it will run on plain torch, "
                  "slowly", file=sys.stderr)  # fmt: skip
            self.extensions = []
        elif find_cxx() is None:
            print("nanoinfer: no C++ compiler found, so it will run on plain torch, slowly; install one "
                  "(apt install g++, or set CXX) and install nanoinfer again", file=sys.stderr)  # fmt: skip
            self.extensions = []
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import torch

        root, temp, cxx = Path(torch.__file__).parent, Path(self.build_temp), find_cxx()
        includes = ["-isystem", str(root / "include"), *(f"-I{path}" for path in self.include_dirs)]
        cu_files = sorted(CSRC.glob("cuda/*.cu"))
        nvcc = wanted_nvcc(cu_files)
        jobs = cpp_jobs(cxx, temp, includes)
        if nvcc:
            jobs = cuda_jobs(nvcc, cxx, temp, includes, cu_files) + jobs
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(Job.run, jobs))
        link(cxx, nvcc, [job.target for job in jobs], root / "lib", Path(self.get_ext_fullpath(ext.name)))


def main() -> None:
    sources = sorted(str(path) for path in CSRC.rglob("*.cpp"))
    others = sorted(str(path) for end in ("h", "cu", "cuh") for path in CSRC.rglob(f"*.{end}"))
    setup(
        ext_modules=[Extension("nanoinfer._C", sources, depends=others, py_limited_api=True)],
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
