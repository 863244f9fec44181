"""Write preprocess_goldens.json: what torchvision's PIL transforms, composed as in openai/CLIP, make of images.

The images are computed (``sample_image`` below), so the tests make the same ones. For each image, the file has the
SHA-256 of the bytes of the float32 result, and a few of its values. To run this again with the torch and Pillow of the
environment:

    pip download --no-deps torchvision==0.29.2
    unzip torchvision-*.whl -d torchvision
    python tests/data/make_preprocess_goldens.py torchvision
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import itertools
import json
import operator
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

OUT = Path(__file__).with_name("preprocess_goldens.json")

MODES = ["RGB", "L", "LA", "P", "RGBA", "CMYK", "1", "I;16"]
RARE_MODES = ["I", "F", "P transparent", "RGB transparent", "L transparent", "PA", "YCbCr", "HSV", "LAB"]

# Width and height. A side of 224 + 4n + 3 pixels after resizing is where half-even rounding and rounding down differ.
SIZES = [
    (224, 224), (224, 225), (224, 226), (224, 227), (227, 224), (225, 224), (231, 224), (640, 427), (427, 640),
    (640, 480), (333, 500), (500, 333), (448, 448), (449, 671), (300, 451),
    (1, 1), (2, 1), (3, 7), (7, 3), (223, 223), (150, 200), (17, 1000), (1000, 17), (1, 100), (100, 1),
]  # fmt: skip

# Size, shortest edge, filter, mean and standard deviation: CLIP's own and others.
SETTINGS: dict[str, tuple[int, int, str, tuple[float, ...], tuple[float, ...]]] = {
    "openai": (224, 224, "BICUBIC", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "bilinear": (32, 32, "BILINEAR", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "longer edge": (32, 37, "BICUBIC", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "lanczos": (33, 40, "LANCZOS", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "nearest": (16, 18, "NEAREST", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def noise(seed: int, *shape: int) -> np.ndarray:
    """Bytes from a generator whose stream numpy promises not to change."""
    count = int(np.prod(shape))
    raw = np.random.PCG64(seed).random_raw(count // 8 + 1).astype("<u8")
    return raw.view(np.uint8)[:count].reshape(shape)


@functools.cache  # several tests use each image, and none changes it
def sample_image(mode: str, width: int, height: int) -> Image.Image:
    """An image of a mode and size: horizontal and vertical gradients with noise, made from bytes without conversion.

    A mode may end in ``" transparent"``: the image's info then makes one colour or some palette entries transparent.
    """
    mode, _, transparent = mode.partition(" ")
    pixels = noise(1000 * height + width, height, width, 4)  # (H, W, 4)
    across = np.arange(width) * 255 // max(width - 1, 1)
    down = (np.arange(height) * 255 // max(height - 1, 1))[:, None]
    slopes = np.stack(np.broadcast_arrays(across, down, 255 - across, (across + down) // 2), axis=-1)
    pixels = ((pixels + 2 * slopes.astype(np.uint16)) // 3).astype(np.uint8)
    pixels[..., 3] = np.where(pixels[..., 3] < 60, 0, pixels[..., 3])  # the alpha of RGBA: partly fully transparent
    size = (width, height)
    grey = pixels[..., 0]
    if mode == "1":
        return Image.frombytes("1", size, np.packbits(grey > 127, axis=1).tobytes())
    if mode == "I;16":
        return Image.frombytes("I;16", size, (grey.astype("<u2") * 3 - 20).tobytes())  # around 255, where Pillow clips
    if mode in ("I", "F"):
        levels = grey.astype(np.int32) * 2 - 100
        return Image.fromarray(levels if mode == "I" else levels.astype(np.float32) / 1.5)
    bands = {"L": 1, "P": 1, "LA": 2, "PA": 2, "RGBA": 4, "CMYK": 4}.get(mode, 3)
    image = Image.frombytes(mode, size, np.ascontiguousarray(pixels[..., 4 - bands :]).tobytes())
    if mode in ("P", "PA"):
        image.putpalette(noise(7, 768).tobytes())
    if transparent:
        colour = tuple(pixels[0, 0, 1:].tolist())
        image.info["transparency"] = {"P": noise(8, 256).tobytes(), "L": colour[-1], "RGB": colour}[mode]
    return image


def sha256(pixels: np.ndarray) -> str:
    """The hash of the values as little-endian float32, in C order."""
    return hashlib.sha256(np.ascontiguousarray(pixels, dtype="<f4").tobytes()).hexdigest()


def samples(pixels: np.ndarray) -> list[float]:
    """One value of each channel at three places of the diagonal. They show the size of an error."""
    side = pixels.shape[-1]
    return [float(str(pixels[i, at, at])) for i, at in enumerate((side // 5, side // 2, side - 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the unpacked torchvision wheel")
    sys.path.insert(0, str(parser.parse_args().folder))
    # torchvision's compiled operators are not needed, and do not load beside another build of torch.
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    def golden(size: int, edge: int, resample: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
        resize = Resize(edge, interpolation=InterpolationMode[resample])
        to_rgb = operator.methodcaller("convert", "RGB")
        return Compose([resize, CenterCrop(size), to_rgb, ToTensor(), Normalize(mean, std)])

    cases = []
    for name, settings in SETTINGS.items():
        transform = golden(*settings)
        for mode, size in [*itertools.product(MODES, SIZES), *itertools.product(RARE_MODES, SIZES[::5])]:
            if name == "openai" or (mode in ("RGB", "RGBA") and size in SIZES[::2]):
                pixels = transform(sample_image(mode, *size)).numpy()
                cases.append([name, mode, *size, sha256(pixels), samples(pixels)])

    versions = {name: importlib.metadata.version(name) for name in ("torch", "pillow", "numpy")}
    versions["torchvision"] = sys.modules["torchvision"].__version__
    lines = ",\n".join(json.dumps(case) for case in cases)
    OUT.write_text(f'{{"versions": {json.dumps(versions)},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{OUT}: {len(cases)} images, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
