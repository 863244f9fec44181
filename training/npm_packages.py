"""The npm packages that the emoji come from: their versions, their download and their files."""

import gzip
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

PACKAGES = {
    "emojibase-data": "17.0.0",  # MIT: names and tags
    "emoji-datasource-google": "16.0.0",  # Apache 2.0
    "emoji-datasource-twitter": "16.0.0",  # Twemoji, CC BY 4.0
    "emoji-datasource-facebook": "16.0.0",  # for choosing settings, never for training or passing on
    "@iconify-json/noto": "1.2.9",  # Apache 2.0
    "@iconify-json/noto-v1": "1.2.5",  # Apache 2.0
    "@iconify-json/fluent-emoji": "1.2.7",  # MIT
    "@iconify-json/fluent-emoji-flat": "1.2.6",  # MIT
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",  # MIT
    "@iconify-json/emojione": "1.2.3",  # CC BY 4.0
    "@iconify-json/emojione-monotone": "1.2.1",  # CC BY 4.0
    "@iconify-json/fxemoji": "1.2.2",  # Apache 2.0
    "@iconify-json/streamline-emojis": "1.2.4",  # CC BY 4.0
    "@iconify-json/tabler": "1.2.41",  # MIT
    "@iconify-json/lucide": "1.2.137",  # ISC
    "@iconify-json/ph": "1.2.2",  # Phosphor, MIT
    "@iconify-json/icon-park-outline": "1.2.4",  # Apache 2.0
    "@iconify-json/mdi": "1.2.3",  # Apache 2.0
    "@iconify-json/game-icons": "1.2.4",  # CC BY 3.0
    "@iconify-json/fa6-solid": "1.2.4",  # Font Awesome Free, CC BY 4.0
    "openmoji": "17.0.0",  # CC BY-SA 4.0: for measuring, never for training
}


def fetch(folder: Path) -> None:
    """Let npm download the missing packages. npm checks the integrity of each package."""
    missing = [f"{name}@{version}" for name, version in PACKAGES.items() if not tarball(folder, name).exists()]
    if not missing:
        return
    if shutil.which("npm") is None:
        raise SystemExit(
            f"{folder} lacks {tarball(folder, missing[0].rpartition('@')[0]).name}, and npm is not installed: "
            "install Node.js, or download the .tgz files and pass their folder as --packages"
        )
    folder.mkdir(parents=True, exist_ok=True)
    print(f"npm downloads {len(missing)} packages into {folder}")
    # Into a temporary folder first, so that an interrupted download is never taken for a complete package.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        done = subprocess.run(
            ["npm", "pack", "--silent", "--pack-destination", temporary, *missing], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"npm could not download the packages: {done.stderr.strip()[-500:]}")
        for path in Path(temporary).iterdir():
            path.replace(folder / path.name)


def tarball(folder: Path, name: str) -> Path:
    return folder / f"{name.removeprefix('@').replace('/', '-')}-{PACKAGES[name]}.tgz"


def read(folder: Path, name: str, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The contents of a package's files whose path within the package is wanted, by that path."""
    path = tarball(folder, name)
    try:
        with tarfile.open(path) as archive:
            members = ((member.name.removeprefix("package/"), member) for member in archive if member.isfile())
            return {inner: archive.extractfile(member).read() for inner, member in members if wanted(inner)}  # type: ignore[union-attr]
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, OSError) as error:
        raise SystemExit(f"{path} cannot be read ({error}): remove it and run again") from None
