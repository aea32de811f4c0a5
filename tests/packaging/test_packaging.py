"""What is shipped, what is built, and what an import loads."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
from cases.gpu_architectures import fake_cuda_home

import mtml
import mtml_kernels
from mtml_kernels import native
from mtml_kernels.native import cuda_device

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(mtml_kernels.__file__).parent
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
SOURCES += ("build_support", "csrc", "mtml_kernels", "python")
# What shapes a build of CUDA code must not come from outside of a test.
SHAPING = {"MTML_CUDA", "MTML_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDAARCHS", "CUDA_HOME", "CUDA_PATH"}

# An editable install answers for every module of the package, the compiled one included, whoever imports it from where.
NO_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""
# One meta-step through the front door: prints its task losses.
META_STEP = """
import json, torch, mtml
net = torch.nn.Linear(2, 1)
batch = [torch.ones(3, 5, n) for n in (2, 1, 2, 1)]
loss = mtml.MAML(net, lr=0.1, steps=3, loss="mse", backend="cpu").meta_loss(*batch)
loss.mean().backward()
print(json.dumps(loss.tolist()))
"""


def python(code: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in {"MTML_BACKEND", "MTML_CPU_ISA", *SHAPING}}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=300)


def setup_py(tree: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    code = f"import runpy, sys; sys.argv = {['setup.py', *arguments]!r}; runpy.run_path('setup.py')"
    return python(code, tree, **variables)


def printed(code: str, cwd: Path, **variables: str) -> str:
    done = python(code, cwd, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, with what a build leaves there: none of that may travel."""
    tree = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        place = ROOT / name
        if place.is_dir():
            shutil.copytree(place, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.json"))
        else:
            shutil.copy(place, tree / name)
    for leftover in ("_C.so", "_build.json"):
        (tree / "mtml_kernels" / leftover).write_text("{}")
    return tree


def files(folder: Path, pattern: str = "*") -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob(pattern) if path.is_file()}


def test_sdist_carries_what_a_build_needs(source_tree: Path, tmp_path: Path) -> None:
    printed(f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))", source_tree)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        carried = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {f"csrc/{name}" for name in files(source_tree / "csrc")}
    for folder in ("build_support", "mtml_kernels", "python"):
        wanted |= {f"{folder}/{name}" for name in files(source_tree / folder, "*.py")}
    wanted |= {"mtml_kernels/cuda/inner_loop/predicted.json"}  # clocks for explain()
    wanted |= {"pyproject.toml", "setup.py", "LICENSE", "mtml_kernels/py.typed", "python/mtml/py.typed"}
    assert wanted - carried == set()
    assert not [name for name in carried if name.endswith((".so", ".o", "_build.json", ".pyc"))]


def test_wheel_has_every_module_and_both_type_markers(source_tree: Path, tmp_path: Path) -> None:
    done = setup_py(source_tree, "build_py", "--build-lib", str(tmp_path))
    assert done.returncode == 0, done.stderr
    built = files(tmp_path)
    wanted = {f"mtml_kernels/{name}" for name in files(source_tree / "mtml_kernels", "*.py")}
    wanted |= {"mtml_kernels/cuda/inner_loop/predicted.json"}  # clocks for explain()
    wanted |= files(source_tree / "python", "*.py") | {"mtml_kernels/py.typed", "mtml/py.typed"}
    assert wanted == built


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"MTML_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "MTML_CUDA=1: CUDA_HOME=/nowhere has no bin/nvcc; install the CUDA",
        ),
        ({"MTML_CUDA": "yes"}, "MTML_CUDA: expected auto, 0 or 1, got 'yes'"),
        ({"CXX": "no-such-compiler"}, "'no-such-compiler' does not run; install g++"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS: expected a positive whole number, got '0'"),
    ],
)
def test_a_build_that_cannot_work_says_so_at_once(source_tree: Path, variables: dict[str, str], message: str) -> None:
    done = setup_py(source_tree, "build_ext", **variables)
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("archs", "message"),
    [
        ("101", "'101' is no GPU architecture that nvcc 13.0.88 knows"),
        ("Hoper", "'Hoper' is no GPU architecture that nvcc 13.0.88 knows"),
        ("native", "'native' asks for the GPUs of this machine, and there is none"),
    ],
)
def test_a_list_of_gpus_that_cannot_be_built_is_one_line(
    source_tree: Path, tmp_path: Path, archs: str, message: str
) -> None:
    """A source archive is made all the same."""
    variables = {"CUDA_HOME": str(fake_cuda_home(tmp_path)), "MTML_CUDA_ARCHS": archs, "CUDA_VISIBLE_DEVICES": ""}
    done = setup_py(source_tree, "build_ext", **variables)
    assert done.returncode != 0
    assert f"mtml-kernels: MTML_CUDA_ARCHS: {message}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert setup_py(source_tree, "build_py", "--build-lib", str(tmp_path / "lib"), **variables).returncode == 0


def test_build_folder_is_keyed_by_the_configuration(source_tree: Path) -> None:
    code = """
import setuptools
from distutils.core import run_setup
build = run_setup("setup.py", [], stop_after="commandline").get_command_obj("build")
build.ensure_finalized()
print(build.build_lib)
"""
    plain = printed(code, source_tree)
    assert plain == printed(code, source_tree)
    assert plain != printed(code, source_tree, CXXFLAGS="-g")


def test_pins_cover_what_the_package_names() -> None:
    def normal(requirement: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    named += [r for extra in project["project"]["optional-dependencies"].values() for r in extra]
    pins = [line for line in (ROOT / "constraints-dev.txt").read_text().splitlines() if not line.startswith("#")]
    assert {normal(r) for r in named} <= {normal(pin) for pin in pins}
    assert "torch==2.13.0" in pins


def test_no_torch_header_in_csrc() -> None:
    headers = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/')
    assert [str(p) for p in (ROOT / "csrc").rglob("*") if p.is_file() and headers.search(p.read_text())] == []


def test_only_the_bindings_know_python() -> None:
    knowing = [p for p in (ROOT / "csrc").rglob("*") if p.is_file() and re.search("pybind11|Python.h", p.read_text())]
    assert {p.parent.name for p in knowing} == {"bindings"}


def objects(pattern: str) -> list[Path]:
    """Objects of the build that is installed; a wheel from elsewhere leaves none behind."""
    record = json.loads((PACKAGE / "_build.json").read_text())
    folders = {ROOT / "build" / record[key] / "objects" / "csrc" for key in ("key", "cpu_key")}
    found = sorted(path for folder in folders for path in folder.rglob(pattern))
    if not found:
        pytest.skip(f"no objects of the installed build under {ROOT / 'build'}: it was not built in this tree")
    return found


def listing(tool: str, *arguments: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} (binutils) is not installed")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def test_no_weak_symbol_in_a_per_isa_object() -> None:
    """The linker keeps one copy of a weak symbol: it may be the AVX-512 one, and then a CPU without it crashes."""
    for path in objects("isa_*.o"):
        symbols = [line.split(maxsplit=2) for line in listing("nm", "-C", "--defined-only", str(path)).splitlines()]
        # DW.ref.* is a pointer to the C++ runtime's exception handler, the same in every object: no code.
        assert [s for s in symbols if s[1] in "WVwvu" and not s[2].startswith("DW.ref.")] == [], path.name


def test_no_object_uses_instructions_it_was_not_compiled_for() -> None:
    """Vector registers wider than the file's instruction set: %ymm needs AVX, %zmm AVX-512."""
    if json.loads((PACKAGE / "_build.json").read_text())["machine"] != "x86_64":
        pytest.skip("the register names are those of x86-64")
    allowed = {"avx512": {"xmm", "ymm", "zmm"}, "avx2": {"xmm", "ymm"}}
    for path in objects("*.o"):
        used = set(re.findall(r"%([xyz]mm)\d", listing("objdump", "-d", "--no-show-raw-insn", str(path))))
        isa = path.stem.split("_")[1] if path.stem.startswith("isa_") else "base"
        assert used <= allowed.get(isa, {"xmm"}), path.name


def test_build_record_names_what_was_built() -> None:
    record = json.loads((PACKAGE / "_build.json").read_text())
    expected = {"key", "cpu_key", "compiler_version", "flags", "isa_flags", "machine", "python", "pybind11"}
    assert {*expected, "cuda_archs", "nvcc_version", "nvcc_flags"} <= set(record)
    gencodes = re.findall(r"-gencode=arch=\w+,code=(\w+)", record["nvcc_flags"])
    assert " ".join(gencodes) == record["cuda_archs"] == " ".join(cuda_device.built_codes())
    assert set(native.info()["available"]) <= set(record["isa_flags"])
    assert str(ROOT) not in json.dumps(record)


def test_import_of_the_engine_loads_nothing_else(tmp_path: Path) -> None:
    code = "import sys, mtml_kernels as m; print(m.__version__, 'torch' in sys.modules, 'numpy' in sys.modules)"
    assert printed(code, tmp_path) == f"{mtml_kernels.__version__} False False"


def test_import_of_mtml_is_light(tmp_path: Path) -> None:
    heavy = ("matplotlib", "typer", "rich", "triton", "sklearn", "PIL", "tqdm", "mtml.train", "mtml.cli", "mtml.compat")
    code = f"""
import sys, torch
before = set(sys.modules)
import mtml
new = set(sys.modules) - before
print([name for name in {heavy} if name in new])
"""
    assert printed(code, tmp_path) == "[]"


def test_all_names_exist() -> None:
    for package in (mtml, mtml_kernels):
        assert [name for name in package.__all__ if not hasattr(package, name)] == []
        assert len(set(package.__all__)) == len(package.__all__)
        assert set(package.__all__) <= set(dir(package))
    contract = {"MAML", "MetaOutput", "Adapted", "InnerLR", "MetaSGD", "TaskBatch", "FallbackWarning", "tasks"}
    assert contract <= set(mtml.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        mtml_kernels.no_such_name  # noqa: B018


def test_metadata_agrees_with_the_package() -> None:
    assert metadata.version("mtml-kernels") == mtml_kernels.__version__
    (script,) = metadata.entry_points(group="console_scripts", name="mtml")
    assert script.value == "mtml.cli:main"


@pytest.mark.parametrize("folder", ["root", "tests", "elsewhere"])
def test_works_from_any_folder(folder: str, tmp_path: Path) -> None:
    cwd = {"root": ROOT, "tests": ROOT / "tests", "elsewhere": tmp_path}[folder]
    assert len(json.loads(printed(META_STEP, cwd))) == 3


def test_source_tree_without_compiled_module_names_the_command(tmp_path: Path) -> None:
    """The package folder in the working directory hides the installed one; the error must say what to do."""
    ignored = shutil.ignore_patterns("_C*", "_build.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "mtml_kernels", ignore=ignored)
    code = (
        NO_EDITABLE
        + """
import torch, mtml_kernels
from mtml_kernels.ops.inner_loop import BACKENDS
print(mtml_kernels.__file__)
BACKENDS.resolve("cpu", "cpu", torch.float32)
"""
    )
    done = python(code, tmp_path)
    assert done.stdout.startswith(str(tmp_path))
    assert "BackendUnavailable" in done.stderr
    assert "pip install -e ." in done.stderr


def test_an_instruction_set_that_is_not_here_raises(tmp_path: Path) -> None:
    done = python(META_STEP, tmp_path, MTML_CPU_ISA="avx1024")
    assert "BackendUnavailable" in done.stderr
    assert "MTML_CPU_ISA=avx1024" in done.stderr
    assert native.info()["available"][0] in done.stderr
