"""What is built and installed is the whole: every module imports from the wheel, in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("storage", "registry", "workers", "engines", "hosts", "daemon")

IMPORT_ALL = """
import importlib, pkgutil, sys, weighbridge
assert weighbridge.__file__.startswith(sys.argv[1]), weighbridge.__file__
names = [m.name for m in pkgutil.walk_packages(weighbridge.__path__, "weighbridge.", onerror=lambda name: 1 / 0)]
for name in names:
    if not name.endswith("__main__") and ".migrations." not in name:
        importlib.import_module(name)
print(len(names))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel built from it, of a copy of what git tracks."""
    copy, dist = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    (copy / "list").write_bytes(listed.stdout)
    tar = ["tar", "--create", "--null", "--ignore-failed-read", "--files-from", str(copy / "list")]
    packed = subprocess.run(tar, cwd=ROOT, capture_output=True, check=True, timeout=60)
    subprocess.run(["tar", "--extract"], cwd=copy, input=packed.stdout, check=True, timeout=60)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(copy)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dist


@pytest.mark.slow
def test_the_wheel_imports_whole(built: Path, tmp_path: Path) -> None:
    """Installed without its dependencies into a new environment that borrows ours, every module imports."""
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=60)
    python = tmp_path / "venv/bin/python"
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, timeout=60)
    borrowed = {"PYTHONPATH": f"{site}:{sysconfig.get_path('purelib')}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [str(python), "-c", IMPORT_ALL, str(site)],
        capture_output=True, text=True, timeout=110, check=False, cwd=tmp_path, env=borrowed,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 100


@pytest.mark.slow
def test_the_wheel_and_the_sdist_hold_every_room(built: Path) -> None:
    """The linked folders as real ones, once; the migrations; the types' marker; the licence; no tests in the wheel."""
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    for room in ROOMS:
        assert f"weighbridge/{room}/__init__.py" in names
        assert not any(name.startswith(f"{room}/") for name in names)
    assert "weighbridge/py.typed" in names
    assert any(name.startswith("weighbridge/registry/migrations/versions/") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any("test" in Path(name).parts[0] for name in names)
    with tarfile.open(sdist) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    assert {f"weighbridge/{room}/__init__.py" for room in ROOMS} <= inside
