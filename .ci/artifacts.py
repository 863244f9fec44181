"""Build the wheel and the source distribution twice, from copies of different ages, and check both.

    pip install -c constraints.txt build && python .ci/artifacts.py

The wheel must hold exactly the tracked files of miniclip/, and the source distribution these and what builds them. The
two wheels must be equal to the byte. The time in them is that of the last commit.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
BESIDE = {
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "PKG-INFO",
    "README.md",
    "SECURITY.md",
    "pyproject.toml",
    "setup.cfg",
}


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def build(place: Path, tracked: list[str], age: int) -> bytes:
    """The wheel. Both archives are built in ``place``, from a copy of the tracked files with other times."""
    for name in tracked:
        (place / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "copy" / name).write_bytes((ROOT / name).read_bytes())
        os.utime(place / "copy" / name, (10**9 + age, 10**9 + age))
    environment = {**os.environ, "SOURCE_DATE_EPOCH": git("log", "-1", "--format=%ct").strip()}
    command = [sys.executable, "-m", "build", "--outdir", str(place / "dist"), str(place / "copy")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the build failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return next((place / "dist").glob("*.whl")).read_bytes()


def check_names(what: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        raise SystemExit(f"{what}: lacks {sorted(expected - found)}, and should not have {sorted(found - expected)}")


def main() -> None:
    tracked = [name for name in git("ls-files", "-z").split("\0") if name]
    package = {name for name in tracked if name.startswith("miniclip/")}
    with tempfile.TemporaryDirectory() as folder:
        first, second = (build(Path(folder) / str(age), tracked, age) for age in (0, 86_400))
        wheel, sdist = sorted((Path(folder) / "0" / "dist").iterdir(), key=lambda path: path.suffix != ".whl")
        information = "-".join(wheel.name.split("-")[:2]) + ".dist-info/"
        with zipfile.ZipFile(wheel) as archive:
            check_names(wheel.name, set(archive.namelist()), package | {information + name for name in METADATA})
        with tarfile.open(sdist) as tar:
            names = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
        names = {name for name in names if not name.startswith("miniclip.egg-info/")}
        check_names(sdist.name, names, package | BESIDE)
    if first != second:
        raise SystemExit(f"two builds of {wheel.name} differ")
    print(f"{wheel.name}: {len(first):,} bytes, sha256 {hashlib.sha256(first).hexdigest()}, the same twice")


if __name__ == "__main__":
    main()
