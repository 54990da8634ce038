"""How the parts depend on each other, and that everything answers in time and from anywhere."""

import ast
import importlib
import pkgutil
import subprocess

import pytest

import sit_atconv
from tests.conftest import ROOT, python

MAY_IMPORT = {  # a package -> the others that it may import, beside `runtime`, which everything may
    "runtime": set(),
    "ops": set(),
    "models": {"ops"},
    "flow": {"encoders"},
    "sampling": {"flow"},
    "encoders": set(),
    "data": {"encoders"},
    "checkpoints": {"models", "data"},
    "classification": {"models", "data", "checkpoints", "training"},
    "generation": {"models", "flow", "sampling", "checkpoints", "data"},
    "evaluation": {"data", "encoders"},
    "training": {"models", "flow", "sampling", "data", "checkpoints"},
    "speed": {"ops", "models", "flow", "sampling", "data"},
    "studies": {"evaluation", "training", "speed", "generation", "models", "flow", "sampling", "data", "checkpoints"},
}
ROOT_MODULES = {
    "train",
    "classify",
    "encode",
    "convert",
    "quickstart",
    "demo",
    "pipeline",
}  # may import anything; nothing imports commands
COMMANDS = {f"sit_atconv.{name}" for name in ROOT_MODULES - {"pipeline"}}
HEAVY = {"torch", "diffusers", "accelerate", "timm", "torch_fidelity", "torchvision", "matplotlib", "sklearn"}
MODULES = sorted(m.name for m in pkgutil.walk_packages(sit_atconv.__path__, "sit_atconv."))


def imports_of(path):
    """The modules of a file's imports, those inside functions too; names imported from a package may be modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module
            yield from (name for alias in node.names if (name := f"{node.module}.{alias.name}") in MODULES)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "lazy_exports":
            yield from (f"sit_atconv.{path.parent.name}.{module.arg}" for module in node.keywords)


def test_packages_import_what_they_may():
    packages = {path.parent.name for path in (ROOT / "sit_atconv").glob("*/__init__.py")}
    assert packages == MAY_IMPORT.keys()
    assert {path.stem for path in (ROOT / "sit_atconv").glob("*.py")} == ROOT_MODULES | {"__init__"}
    for package, allowed in MAY_IMPORT.items():
        for path in (ROOT / "sit_atconv" / package).rglob("*.py"):
            used = {name.split(".")[1] for name in imports_of(path) if name.startswith("sit_atconv.")}
            assert used <= allowed | {package, "runtime", "__version__"}, path
    for path in (ROOT / "sit_atconv" / "ops").rglob("*.py"):
        assert {name.split(".")[0] for name in imports_of(path)} <= {
            "torch",
            "triton",
            "sit_atconv",
            "contextlib",
            "os",
            "warnings",
        }


def test_no_file_imports_itself_by_way_of_others():
    graph = {}
    for path in (ROOT / "sit_atconv").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {found for found in imports_of(path) if found in MODULES} - {name}
    cycles, seen = [], {}  # name -> whether it is on the way that is being followed

    def follow(name, way):
        if seen.get(name):
            cycles.append(" -> ".join([*way[way.index(name) :], name]))
        elif name not in seen:
            seen[name] = True
            for other in sorted(graph.get(name, ())):
                follow(other, [*way, name])
            seen[name] = False

    for name in sorted(graph):
        follow(name, [])
    assert cycles == []


def test_the_operator_needs_neither_cuda_nor_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from sit_atconv.ops import dynamic_depthwise_conv2d as op, fastest_implementation as fastest\n"
        "print(*op(torch.ones(1, 4, 1), torch.ones(1, 1, 3, 3), (2, 2)).flatten().tolist())\n"
        "print(fastest(torch.device('cpu')), fastest(torch.device('cuda')))"
    )
    done = subprocess.run(python("-c", code), capture_output=True, text=True)
    assert done.stdout.split() == ["4.0"] * 4 + ["channels_last"] * 2, done.stderr
    assert "Triton 3.3 or later (installed: 0.0)" in done.stderr


def test_every_module_imports_and_commands_are_imported_by_none():
    assert len(MODULES) > 25
    for name in MODULES:
        importlib.import_module(name)
    for path in (ROOT / "sit_atconv").rglob("*.py"):
        assert not COMMANDS & set(imports_of(path)), path


def test_no_module_hides_another():
    """`accelerate launch sit_atconv/train.py` puts sit_atconv/ itself on the path."""
    import importlib.metadata
    import sys

    top_level = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    mine = {name.split(".")[1] for name in MODULES}
    assert not mine & (top_level - {"tests"})


@pytest.mark.parametrize(
    "argv",
    [
        ["sample/generate.py", "--help"],
        ["eval/fid.py", "--help"],
        ["eval/speed.py", "--help"],
        ["eval/compare.py", "--help"],
        ["eval/sweep.py", "--help"],
        ["sit_atconv/encode.py", "--help"],
        ["sit_atconv/convert.py", "--help"],
        ["sample/generate.py", "--cfg", "x"],
        ["eval/fid.py", "--samples", "nowhere"],
        ["sit_atconv/convert.py", "a.pt"],
    ],
)
def test_help_and_argument_errors_load_nothing_heavy(argv, tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = {[str(ROOT / argv[0]), *argv[1:]]!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"finally:\n    sys.stderr.write('loaded: ' + str(sorted({HEAVY!r} & set(sys.modules))))\n"
    )
    done = subprocess.run(python("-c", code), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in argv else 2) and "loaded: []" in done.stderr, done.stderr
    assert ("usage:" in done.stdout) if "--help" in argv else ("Traceback" not in done.stderr)


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sit_atconv, sit_atconv.models, sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert subprocess.run(python("-c", code), capture_output=True, text=True).stdout.strip() == "[]"


def test_no_module_holds_a_number_of_imagenet():
    for path in [*(ROOT / "sample").glob("*.py"), *(ROOT / "eval").glob("*.py"), *(ROOT / "sit_atconv").rglob("*.py")]:
        numbers = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not numbers & {1281167, 1001}, path
