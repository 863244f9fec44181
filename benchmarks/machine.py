"""The processor that a result belongs to."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

FEATURES = {"amx_bf16": "amx-bf16", "avx512_bf16": "avx512-bf16", "avx512f": "avx512", "avx2": "avx2"}  # best first
NOISE = r"\((r|tm)\)|\bprocessor\b|\bcpu\b|@|\b\d+-core\b|\bwith radeon graphics\b"


@dataclass(frozen=True)
class Processor:
    """What /proc/cpuinfo says: the marketing name, the family and model numbers, and the widest instructions.

    Clouds give one name to several generations ("AMD EPYC"), so the numbers and the instructions are part of the slug.
    """

    name: str
    family: int | None = None
    model: int | None = None
    instructions: str = ""

    @property
    def bfloat16(self) -> bool:
        """Whether it multiplies bfloat16 by instructions of its own. Emulated, bfloat16 is slower than float32."""
        return self.instructions.endswith("bf16")

    @property
    def short_name(self) -> str:
        return " ".join(re.sub(NOISE, " ", self.name, flags=re.IGNORECASE).split())

    @property
    def title(self) -> str:
        numbers = [f"family {self.family} model {self.model}"] if self.family is not None else []
        return ", ".join([self.short_name, *numbers, *filter(None, [self.instructions])])

    @property
    def slug(self) -> str:
        """For a file's name: ``amd-epyc-family-26-model-2-avx512-bf16``."""
        return re.sub(r"[^a-z0-9.]+", "-", self.title.lower()).strip("-")


def processor(cpuinfo: str | None = None) -> Processor:
    """This machine's processor, or the one that a text in /proc/cpuinfo's form describes."""
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        except OSError:
            cpuinfo = ""
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())}
    name = found.get("model name") or platform.processor() or platform.machine()
    flags = set(found.get("flags", "").split())
    instructions = next((title for flag, title in FEATURES.items() if flag in flags), "")
    family, model = (int(found[key]) if key in found else None for key in ("cpu family", "model"))
    return Processor(name, family, model, instructions)
