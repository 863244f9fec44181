"""What the examples share: the sample images, folders of captioned images, the choice of a model, and messages."""

import csv
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the imports of packages that an optional extra installs: name a missing one in a single sentence."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SystemExit(f"{script_name()}: {missing(error, extra)}") from None


def missing(error: ModuleNotFoundError, extra: str) -> str:
    return f'the package {error.name} is missing: in a clone, run pip install -c constraints.txt -e ".[{extra}]"'


def script_name() -> str:
    return Path(sys.argv[0]).name


with needs("examples"):
    import miniclip

IMAGES = Path(__file__).parent / "images"


MODEL_HELP = "a name, path or Hub repository (default: demo, and only for the sample images)"


def model_name(given: str | None, own_images: bool) -> str:
    """The name of the model to load: the given one, else demo for the sample images.

    There is no default for other images: the demo would guess at them, and a real model is a large download.

    Args:
        given: what ``--model`` says, if anything.
        own_images: whether the images are the user's, not the samples.

    Raises:
        SystemExit: if no model is given for the user's images. The sentence names two.
    """
    if given:
        return given
    if own_images:
        raise SystemExit(
            "say which model: --model demo, which knows emoji only, or --model ViT-B/32, a download of 605 MB"
        )
    print("the demo model on examples/images; use --model ViT-B/32 for a real one", file=sys.stderr)
    return "demo"


def read_captions(folder: Path) -> dict[str, list[str]]:
    """Read captions.csv, which has the columns image and caption.

    Args:
        folder: the folder of the images and of captions.csv. An image with several captions has several rows.

    Returns:
        For each image, named relative to the folder, its captions. Both are in the order of the file.

    Raises:
        SystemExit: if captions.csv is missing or malformed, lists nothing, or lists an image that does not exist.
    """
    path = folder / "captions.csv"
    captions: dict[str, list[str]] = {}
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):  # line 1 is the heading
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
        raise SystemExit(f"{path} lists no images")
    if absent := [name for name in captions if not os.path.isfile(folder / name)]:
        raise SystemExit(f"{path} lists {len(absent)} images that do not exist, the first is {absent[0]}")
    return captions


def two_decimals(value: float) -> str:
    """A number for a figure: with a real minus sign, and 0.00 for whatever rounds to zero, never -0.00."""
    return f"{value:z.2f}".replace("-", "\N{MINUS SIGN}")


def check_figure_path(path: Path) -> None:
    """Refuse a place where no PNG can be written, before anything is computed.

    Raises:
        SystemExit: if the name does not end in .png, or the folder does not exist.
    """
    if path.suffix.lower() != ".png":
        raise SystemExit(f"{path}: the figure is a PNG, so its name must end in .png")
    if not path.resolve().parent.is_dir():
        raise SystemExit(f"there is no folder {path.resolve().parent}")


def main(script_main: Callable[[], None]) -> None:
    """Run a script. An expected error becomes one sentence behind the script's name, without a traceback."""
    try:
        script_main()
    except ModuleNotFoundError as error:  # some packages are imported only where they are used
        sys.exit(f"{script_name()}: {missing(error, 'examples')}")
    except miniclip.MiniclipError as error:
        sys.exit(f"{script_name()}: {error}")
    except SystemExit as stopped:
        sys.exit(f"{script_name()}: {stopped.code}" if isinstance(stopped.code, str) else stopped.code)
    except KeyboardInterrupt:
        print(f"{script_name()}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of the output closed the pipe, as `head` does. Python would report the error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # such as a full disk or a missing permission
        sys.exit(f"{script_name()}: {error}")
