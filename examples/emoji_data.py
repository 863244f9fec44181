"""Make folders of captioned pictures from emoji, to train the demo model on and to measure it with.

    pip install "miniclip[examples]"
    python examples/emoji_data.py emoji                        npm fetches the packages (about 170 MB)
    python examples/emoji_data.py emoji --packages downloads   or their .tgz files are in a folder already

    emoji/train/            nine sets, under licences that permit training on them and sharing the result
    emoji/twemoji/          held out whole: ordinary colour pictures
    emoji/openmoji-black/   held out whole: thin black outlines
    emoji/openmoji-color/   the same drawings with colours
    emoji/names.txt         what all entries are called

Each folder holds 64-pixel PNGs with a transparent background and a captions.csv (image, caption). The entries, their
names and their tags are emojibase's; the first caption of a picture is its bare name. Flags are in, skin tones not.
"""

import argparse
import csv
import gzip
import io
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import common
from PIL import Image

SIZE = 64  # pixels: what the PNG packages hold

PACKAGES = {
    "emojibase-data": "17.0.0",  # MIT: names and tags
    "emoji-datasource-google": "16.0.0",  # Apache 2.0
    "emoji-datasource-twitter": "16.0.0",  # Twemoji, CC BY 4.0
    "@iconify-json/noto-v1": "1.2.5",  # Apache 2.0
    "@iconify-json/fluent-emoji": "1.2.7",  # MIT
    "@iconify-json/fluent-emoji-flat": "1.2.6",  # MIT
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",  # MIT
    "@iconify-json/emojione": "1.2.3",  # CC BY 4.0
    "@iconify-json/emojione-monotone": "1.2.1",  # CC BY 4.0
    "@iconify-json/fxemoji": "1.2.2",  # Apache 2.0
    "@iconify-json/streamline-emojis": "1.2.4",  # CC BY 4.0
    "openmoji": "17.0.0",  # CC BY-SA 4.0: measured on, never trained on
}
# Those to train on. The last three are black and white or outlined: an outline is a drawing of the thing as well.
ICONIFY = ["noto-v1", "fluent-emoji", "fluent-emoji-flat", "emojione", "fxemoji"]
ICONIFY += ["fluent-emoji-high-contrast", "emojione-monotone", "streamline-emojis"]

# None of these is among the templates that demo_quality.py measures with. Many and of many shapes, so that what is
# learned is to find the thing in a sentence, and not the sentences.
TEMPLATES = (
    *("{a}", "{a}.", "{name}", "the {name}", "one {name}", "my {name}", "some {name}", "{name}!", "a photo of {a}."),
    *("a photo of a {name}.", "a photo of {name}", "photo: {name}", "{a} in a photo", "a close-up photo of {a}."),
    *("a photo of {a} in the distance.", "a blurry photo of the {name}.", "a photo of my {name}"),
    *("a good photo of {a}.", "a bad photo of the {name}.", "a black and white photo of {a}."),
    *("a photo of many {name}", "a picture of {a}", "a picture of the {name}.", "picture of {name}"),
    *("in the picture there is {a}.", "a drawing of {a}.", "{a} drawn by hand", "a simple drawing of the {name}"),
    *("a sketch of {a}.", "a painting of {a}.", "a cartoon of {a}", "the cartoon {name}.", "a rendering of {a}."),
    *("{a} in 3D", "graphics of the {name}", "an emoji of {a}", "the {name} emoji", "emoji: {name}"),
    *("an icon showing {a}", "icon of {name}", "{name} icon", "a symbol for {a}", "a small image of {a}."),
    *("an image that shows {a}", "image of {name}.", "a sign with {a}", "an outline of {a}.", "{a} as an outline"),
    *("line art: {name}", "a logo of {a}", "a silhouette of the {name}", "{a} on a plain background", "{a} on white"),
    *("{a} against a coloured background", "a colourful {name}", "here is {a}.", "it is {a}", "that's {a}!"),
    *("look at this {name}.", "there is {a} here.", "can you see {a}?", "what you see is {a}", "{a} is shown here."),
    *("we see {a}", "I like this {name}", "this one shows {a}.", "is it {a}?", "a toy {name}."),
    *("a {name} made of plastic", "a pin with {a} on it", "a stamp with {a}", "{a} for children"),
)


@dataclass
class Entry:
    """One emoji and what it is called."""

    hexcode: str
    name: str  # "flag of France"
    synonyms: list[str]
    tags: list[str]
    slugs: list[str] = field(default_factory=list)  # what icon sets may call it, likeliest first


# -- packages ---------------------------------------------------------------------------------------------------------


def fetch(folder: Path) -> None:
    """Let npm download what is missing; it checks the integrity of each package itself."""
    missing = [f"{name}@{version}" for name, version in PACKAGES.items() if not tarball(folder, name).exists()]
    if not missing:
        return
    if shutil.which("npm") is None:
        raise SystemExit(
            f"{folder} lacks {tarball(folder, missing[0].rpartition('@')[0]).name}, and there is no npm "
            "to fetch it: install Node.js, or put the .tgz files there and pass --packages"
        )
    folder.mkdir(parents=True, exist_ok=True)
    print(f"npm fetches {len(missing)} packages into {folder}")
    # Downloaded elsewhere and moved: a download that was cut off must not be taken for a package.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        done = subprocess.run(
            ["npm", "pack", "--silent", "--pack-destination", temporary, *missing], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"npm could not fetch the packages: {done.stderr.strip()[-500:]}")
        for path in Path(temporary).iterdir():
            path.replace(folder / path.name)


def tarball(folder: Path, name: str) -> Path:
    return folder / f"{name.removeprefix('@').replace('/', '-')}-{PACKAGES[name]}.tgz"


def read(folder: Path, name: str, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The wanted files of a package, by their path in it."""
    path = tarball(folder, name)
    try:
        with tarfile.open(path) as archive:
            members = ((member.name.removeprefix("package/"), member) for member in archive if member.isfile())
            return {name: archive.extractfile(member).read() for name, member in members if wanted(name)}  # type: ignore[union-attr]
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, OSError) as error:
        raise SystemExit(f"{path} cannot be read ({error}): remove it and run again") from None


# -- names ------------------------------------------------------------------------------------------------------------


def read_entries(folder: Path) -> list[Entry]:
    files = read(folder, "emojibase-data", lambda name: name in ("en/data.json", "en/shortcodes/emojibase.json"))
    listed = json.loads(files["en/data.json"])
    shortcodes = json.loads(files["en/shortcodes/emojibase.json"])
    unicode_file = read(folder, "emoji-datasource-google", lambda name: name == "emoji.json")["emoji.json"]
    unicode = {code(item["unified"]): item for item in json.loads(unicode_file)}
    entries = []
    for item in listed:
        if item.get("group") in (None, 2):  # letters of flags, and skin tones and hair as such
            continue
        key, label = code(item["hexcode"]), item["label"].replace("’", "'")
        codes = shortcodes.get(item["hexcode"], [])
        names = [spoken(name.replace("_", " ")) for name in ([codes] if isinstance(codes, str) else codes)]
        slugs = [slug(label)]
        if label.startswith("flag: "):
            country = label.removeprefix("flag: ")
            names, slugs = [f"{country} flag", label], [*slugs, slug(f"flag for {country}"), slug(country)]
        if known := unicode.get(key):
            if known["name"] and "FLAG" not in known["name"]:
                names.append(spoken(known["name"].lower()))
            slugs += [slug(name) for name in (known["name"] or "", *known["short_names"])]
        name = spoken(label)
        synonyms = [other for other in dict.fromkeys(names) if other != name]
        tags = [tag for tag in item.get("tags", ()) if len(tag) > 2]
        entries.append(Entry(key, name, synonyms, tags, [text for text in slugs if text]))
    return entries


def spoken(label: str) -> str:
    """A label as a person would say it: "family: man, woman, boy" is "family of a man, a woman and a boy"."""
    head, colon, tail = label.partition(": ")
    if not colon:
        return label
    if head == "flag":
        return f"flag of {tail}"
    if head == "keycap":
        return f"keycap {tail}"
    if head in ("family", "kiss", "couple with heart"):
        people = [with_article(person) for person in tail.split(", ")]
        return f"{head} of {' and '.join([', '.join(people[:-1]), people[-1]] if people[1:] else people)}"
    if head in ("man", "woman", "person"):
        return f"{head} who is bald" if tail == "bald" else f"{head} with {'a ' * (tail == 'beard')}{tail}"
    return f"{head} {tail}"


def with_article(name: str) -> str:
    """A rule of thumb. It errs on "a rice" and "a scissors", and so do the people who fill in "a photo of a {}"."""
    if name[:1].isdigit() or re.match(r"(two|three|the|keycap|.*’s|.*'s)\b", name):
        return name
    first, head = name.split(" ")[0], name.split(" with ")[0].split(" of ")[0]
    if name.startswith("flag of "):
        return f"the {name}"
    if head.endswith("s") and not head.endswith(("ss", "us", "is")):
        return name
    return f"{'an' if re.match('[aeio]|u(?!n[ij]|se)', first.lower()) else 'a'} {name}"


def captions(entry: Entry, pick: random.Random) -> list[str]:
    """The bare name first, then what people might write: prompts, other names, tags."""
    lines = [entry.name]
    lines += [template.format(name=entry.name, a=with_article(entry.name)) for template in pick.sample(TEMPLATES, 9)]
    others = pick.sample(entry.synonyms, min(2, len(entry.synonyms)))
    lines += [pick.choice(TEMPLATES).format(name=other, a=with_article(other)) for other in others]
    if entry.tags:
        lines.append(f"{entry.name}, {', '.join(pick.sample(entry.tags, min(2, len(entry.tags))))}")
    return list(dict.fromkeys(lines))


def code(hexcode: str) -> str:
    """Without the selectors of the coloured presentation, which every vendor writes as it pleases."""
    return hexcode.upper().replace("-FE0F", "")


def slug(text: str) -> str:
    text = text.lower().replace("&", "and").replace("'", "").replace("’", "")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub("[^a-z0-9]+", "-", text).strip("-")


# -- pictures ---------------------------------------------------------------------------------------------------------

Pictures = Iterator[tuple[Entry, Image.Image]]


def png_pictures(folder: Path, package: str, vendor: str, entries: list[Entry]) -> Pictures:
    files = read(folder, package, lambda name: name.startswith(f"img/{vendor}/64/"))
    by_code = {code(Path(name).stem): data for name, data in files.items()}
    for entry in entries:
        if data := by_code.get(entry.hexcode):
            yield entry, Image.open(io.BytesIO(data)).convert("RGBA")


def iconify_pictures(folder: Path, name: str, entries: list[Entry]) -> Pictures:
    """An icon set knows its drawings by name; some write the words together, some number their variants."""
    files = read(folder, f"@iconify-json/{name}", lambda name: name in ("icons.json", "chars.json"))
    sets = json.loads(files["icons.json"])
    icons = sets["icons"]
    by_name: dict[str, str] = {}
    for icon in sets["icons"]:
        by_name.setdefault(icon.replace("-", ""), icon)
        by_name.setdefault(re.sub(r"-\d$", "", icon).replace("-", ""), icon)
    for alias, target in sets.get("aliases", {}).items():
        if set(target) == {"parent"}:  # not a mirrored or turned one
            by_name.setdefault(alias.replace("-", ""), target["parent"])
    by_code = {code(key): icon for key, icon in json.loads(files["chars.json"]).items()}
    for entry in entries:
        found = by_code.get(entry.hexcode)
        found = found or next((by_name[s.replace("-", "")] for s in entry.slugs if s.replace("-", "") in by_name), None)
        if found:
            icon = icons[found]
            width, height = (icon.get(side, sets.get(side, 16)) for side in ("width", "height"))
            yield (
                entry,
                draw(
                    f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                    f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
                ),
            )


def openmoji_pictures(folder: Path, style: str, entries: list[Entry]) -> Pictures:
    files = read(folder, "openmoji", lambda name: name.startswith(f"{style}/svg/"))
    by_code = {code(Path(name).stem): data for name, data in files.items()}
    for entry in entries:
        if data := by_code.get(entry.hexcode):
            yield entry, draw(data.decode())


def draw(svg: str, size: int = SIZE) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def write(folder: Path, sets: dict[str, Pictures], seed: int) -> None:
    """A folder of pictures and their captions.csv, which is written last: a folder that has one is complete."""
    (folder / "captions.csv").unlink(missing_ok=True)  # an earlier run's, which would speak for this one's pictures
    rows: list[tuple[str, str]] = []
    for vendor, pictures in sets.items():
        (folder / vendor).mkdir(parents=True, exist_ok=True)
        before = len(rows)
        drawn = 0
        for entry, picture in pictures:
            if picture.getchannel("A").getextrema()[1] == 0:
                continue  # nothing was drawn
            name = f"{vendor}/{entry.hexcode.lower()}.png"
            picture.save(folder / name)
            rows += [(name, line) for line in captions(entry, random.Random(f"{seed} {name}"))]
            drawn += 1
        print(f"  {folder.name}/{vendor}: {drawn:,} pictures, {len(rows) - before:,} captions", flush=True)
    temporary = folder / "captions.csv.tmp"
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    temporary.replace(folder / "captions.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--packages", type=Path, help="where the npm packages are or go (default: OUT/packages)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of captions (default: 0)")
    options = parser.parse_args()
    import resvg_py  # noqa: F401  (missing, it is told before anything is fetched)

    packages = options.packages or options.out / "packages"
    fetch(packages)
    entries = read_entries(packages)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "names.txt").write_text("".join(f"{entry.name}\n" for entry in entries), encoding="utf-8")
    train = {"google": png_pictures(packages, "emoji-datasource-google", "google", entries)}
    train |= {name: iconify_pictures(packages, name, entries) for name in ICONIFY}
    write(options.out / "train", train, options.seed)
    twitter = png_pictures(packages, "emoji-datasource-twitter", "twitter", entries)
    write(options.out / "twemoji", {"twemoji": twitter}, options.seed)
    for style in ("black", "color"):
        write(options.out / f"openmoji-{style}", {style: openmoji_pictures(packages, style, entries)}, options.seed)


if __name__ == "__main__":
    common.run(main)
