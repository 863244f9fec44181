"""What the examples share: the sample pictures, captioned folders, and which model is meant."""

import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

_EXTRAS = {"ray": "ray", "pyarrow": "embed"}  # all other packages come with the extra examples


def _say_what_is_missing(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, ModuleNotFoundError):
        script, extra = Path(sys.argv[0]).name, _EXTRAS.get(error.name or "", "examples")
        print(f'{script}: the package {error.name} is missing: pip install "miniclip[{extra}]"', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# Not in ``run``, because the scripts import what they need before they get that far.
sys.excepthook = _say_what_is_missing

import miniclip  # noqa: E402

IMAGES = Path(__file__).parent / "images"


def model_name(given: str | None, own_pictures: bool) -> str:
    """The demo model is for the sample pictures; on anybody's own, the real one is meant unless another is named."""
    if given:
        return given
    if own_pictures:
        return "ViT-B/32"
    print("the demo model on examples/images; --model ViT-B/32 takes the real one", file=sys.stderr)
    return "demo"


def read_captions(folder: Path) -> dict[str, list[str]]:
    """A folder's captions.csv, with the columns image and caption, as picture -> its captions, in the file's order."""
    path = folder / "captions.csv"
    captions: dict[str, list[str]] = {}
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):  # the first line is the heading
                if None in row:
                    raise SystemExit(f'{path} has a comma too many in line {number}: put a caption with commas in "')
                if not row["image"] or not row["caption"]:
                    raise SystemExit(f"{path} has no image or no caption in line {number}")
                captions.setdefault(row["image"], []).append(row["caption"])
    except FileNotFoundError:
        raise SystemExit(f"{folder} has no captions.csv with the columns image,caption") from None
    except KeyError as missing:
        raise SystemExit(f"{path} has no column {missing}") from None
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not UTF-8 ({error.reason})") from None
    except (OSError, csv.Error) as error:
        raise SystemExit(f"{path} cannot be read ({error})") from None
    if not captions:
        raise SystemExit(f"{path} lists no pictures")
    if absent := [name for name in captions if not os.path.isfile(folder / name)]:
        raise SystemExit(f"{path} lists {len(absent)} pictures that are not there, the first is {absent[0]}")
    return captions


def run(main: Callable[[], None]) -> None:
    """Run a script; what goes wrong for a reason is one sentence after its name, not a traceback."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except miniclip.MiniclipError as error:
        sys.exit(f"{script}: {error}")
    except SystemExit as stopped:
        sys.exit(f"{script}: {stopped.code}" if isinstance(stopped.code, str) else stopped.code)
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has had enough, as `head` does. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # no room, no permission
        sys.exit(f"{script}: {error}")
