"""Make folders of captioned images from emoji, to train the demo model and to measure it.

    pip install -c constraints.txt -e ".[examples]"
    python training/emoji_data.py emoji                        npm downloads the packages (about 270 MB)
    python training/emoji_data.py emoji --packages downloads   uses the .tgz files in this folder, if they exist

    emoji/train/            sets of emoji and icons, whose licences permit training and sharing the result;
                            those in train/line are harder: icons in one colour, and outlines
    emoji/facebook/         never trained on: settings are chosen on it
    emoji/twemoji/          never trained on: ordinary colour images
    emoji/openmoji-black/   never trained on: thin black outlines
    emoji/openmoji-color/   never trained on: the same drawings in colour
    emoji/names.txt         the names of all emoji
    emoji/everyday.txt      200 plain nouns; training/everyday.txt is the copy that demo_quality.py uses

Each folder holds PNGs of 64 pixels with a transparent background, and a captions.csv (image, caption). The list of
emoji, their names and their tags come from emojibase. The captions are names and words, not sentences. The first
caption of an image is its full name. A caption that shall be drawn more often stands more than once. Flags are
included, skin tones are not.
"""

import argparse
import csv
import io
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shared
from emoji_names import Entry, code, phrases, read_entries
from npm_packages import fetch, read
from PIL import Image

SIZE = 64  # pixels: the size of the images in the PNG packages

# The icon sets for training, drawn as they are. Those of the second row are black and white or outlines.
ICONIFY = ["noto-v1", "fluent-emoji", "fluent-emoji-flat", "emojione", "fxemoji"]
ICONIFY += ["fluent-emoji-high-contrast", "emojione-monotone", "streamline-emojis"]
# Icons in one colour, of which the few that bear an emoji's name are used.
ICONS = ["tabler", "lucide", "ph", "icon-park-outline", "mdi", "game-icons", "fa6-solid"]
# Sets in colour whose shapes are drawn a second time, as outlines.
OUTLINED = ["noto", "noto-v1", "fluent-emoji-flat", "emojione", "fxemoji"]

EmojiImages = Iterator[tuple[Entry, Image.Image]]


def png_images(folder: Path, package: str, vendor: str, entries: list[Entry]) -> EmojiImages:
    """The images of a package of PNGs, found by code point."""
    files = read(folder, package, lambda name: name.startswith(f"img/{vendor}/64/"))
    by_code = {code(Path(name).stem): data for name, data in files.items()}
    for entry in entries:
        if data := by_code.get(entry.hexcode):
            yield entry, Image.open(io.BytesIO(data)).convert("RGBA")


def iconify_images(folder: Path, name: str, entries: list[Entry], outlines: int | None = None) -> EmojiImages:
    """The images of an icon set, found by name. Some sets omit the hyphens, and some number their variants.

    With ``outlines``, a seed, the shapes are drawn as outlines of random width.
    """
    files = read(folder, f"@iconify-json/{name}", lambda name: name in ("icons.json", "chars.json"))
    files.setdefault("chars.json", b"{}")  # plain icons have no code points
    sets = json.loads(files["icons.json"])
    by_name: dict[str, str] = {}
    for icon in sets["icons"]:
        by_name.setdefault(icon.replace("-", ""), icon)
        by_name.setdefault(re.sub(r"-\d$", "", icon).replace("-", ""), icon)
    for alias, target in sets.get("aliases", {}).items():
        if set(target) == {"parent"}:  # not a mirrored or rotated alias
            by_name.setdefault(alias.replace("-", ""), target["parent"])
    by_code = {code(key): icon for key, icon in json.loads(files["chars.json"]).items()}
    for entry in entries:
        found = by_code.get(entry.hexcode)
        found = found or next((by_name[s.replace("-", "")] for s in entry.slugs if s.replace("-", "") in by_name), None)
        if found:
            svg = svg_document(sets, found)
            if outlines is not None:
                svg = outlined(svg, random.Random(f"{outlines} {name} {entry.hexcode}").uniform(1, 2.4))
            yield entry, draw(svg)


def svg_document(sets: dict[str, Any], name: str) -> str:
    """An icon as an SVG file: an icon set gives its body, and its size if that is not the size of the whole set."""
    icon = sets["icons"][name]
    width, height = (icon.get(side, sets.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
    )


def outlined(svg: str, pixels: float) -> str:
    """The shapes of an SVG as outlines: white inside, with a black stroke of so many pixels in an image of SIZE.

    White, not transparent, so that a shape in front covers the strokes behind it, as in a drawing by hand.
    """
    _, _, width, height = map(float, re.search('viewBox="([^"]*)"', svg)[1].split())  # type: ignore[index]
    stroke = pixels * max(width, height) / SIZE
    style = (
        "path,circle,ellipse,rect,polygon,polyline,line{fill:#fff!important;fill-opacity:1!important;"
        f"opacity:1!important;stroke:#000!important;stroke-width:{stroke:.3f}px!important;stroke-linejoin:round}}"
    )
    return svg.replace(">", f"><style>{style}</style>", 1)


def openmoji_images(folder: Path, style: str, entries: list[Entry]) -> EmojiImages:
    """OpenMoji's drawings, found by code point. ``style`` is black or color."""
    files = read(folder, "openmoji", lambda name: name.startswith(f"{style}/svg/"))
    by_code = {code(Path(name).stem): data for name, data in files.items()}
    for entry in entries:
        if data := by_code.get(entry.hexcode):
            yield entry, draw(data.decode())


def draw(svg: str, size: int = SIZE) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def write(folder: Path, sets: dict[str, EmojiImages], seed: int) -> None:
    """Write the images and their captions.csv. That file comes last, so a folder with a captions.csv is complete."""
    (folder / "captions.csv").unlink(missing_ok=True)  # that of an earlier run does not describe the new images
    rows: list[tuple[str, str]] = []
    for vendor, images in sets.items():
        (folder / vendor).mkdir(parents=True, exist_ok=True)
        before = len(rows)
        drawn = 0
        for entry, image in images:
            if image.getchannel("A").getextrema()[1] == 0:
                continue  # an empty drawing
            name = f"{vendor}/{entry.hexcode.lower()}.png"
            image.save(folder / name)
            rows += [(name, line) for line in phrases(entry, random.Random(f"{seed} {name}"))]
            drawn += 1
        print(f"  {folder.name}/{vendor}: {drawn:,} images, {len(rows) - before:,} captions", flush=True)
    temporary = folder / "captions.csv.tmp"
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    temporary.replace(folder / "captions.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to create")
    parser.add_argument("--packages", type=Path, help="the folder of the npm packages (default: OUT/packages)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the choice of captions (default: 0)")
    options = parser.parse_args()
    import resvg_py  # noqa: F401  a missing package is reported before anything is downloaded

    packages = options.packages or options.out / "packages"
    fetch(packages)
    entries = read_entries(packages)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "names.txt").write_text("".join(f"{entry.name}\n" for entry in entries), encoding="utf-8")
    everyday = "".join(f"{entry.name}\n" for entry in entries if entry.everyday)
    (options.out / "everyday.txt").write_text(everyday, encoding="utf-8")
    train = {"google": png_images(packages, "emoji-datasource-google", "google", entries)}
    train |= {name: iconify_images(packages, name, entries) for name in ICONIFY}
    train |= {f"line/{name}": iconify_images(packages, name, entries) for name in ICONS}
    train |= {f"line/{name}-outlined": iconify_images(packages, name, entries, options.seed) for name in OUTLINED}
    write(options.out / "train", train, options.seed)
    facebook = png_images(packages, "emoji-datasource-facebook", "facebook", entries)
    write(options.out / "facebook", {"facebook": facebook}, options.seed)
    twitter = png_images(packages, "emoji-datasource-twitter", "twitter", entries)
    write(options.out / "twemoji", {"twemoji": twitter}, options.seed)
    for style in ("black", "color"):
        write(options.out / f"openmoji-{style}", {style: openmoji_images(packages, style, entries)}, options.seed)


if __name__ == "__main__":
    shared.main(main)
