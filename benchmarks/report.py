"""Result files, one for each processor; the tables and the chart that are made from all of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inputs import ROOT
from measure import Row

RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
CHART = Path("docs", "figures", "speed.png")
SMALL: dict[str, tuple[str, ...]] = {  # the README's works, and the peers it names
    "ViT-B/32 images, batch 1": ("transformers", "ONNX Runtime", "OpenVINO"),
    "ViT-B/32 images, batch 16": ("transformers", "ONNX Runtime", "OpenVINO"),
    "ViT-B/16 images, batch 8": ("transformers", "ONNX Runtime", "OpenVINO"),
    "ViT-B/32 images, batch 16, bfloat16": ("transformers", "OpenVINO"),
    "256 zero-shot prompts": ("transformers, cut to the longest", "OpenVINO, padded to 77"),
    "20,000 new captions to ids, one thread": ("transformers (Rust)", "openai/CLIP"),
    "preprocess one image, 12 megapixels": ("transformers (PIL)",),
    "embed a folder, per image of 640 × 480": ("transformers, a loop",),
    "from python to the first embedding": ("transformers",),
}
TABLE_ONLY = {"ViT-B/32 images, batch 8", "ViT-B/32 images, batch 64", "ViT-B/16 images, batch 16"}  # not in the chart
OTHERS = "others"
COLOURS = {"transformers": "#e69f00", "ONNX Runtime": "#56b4e9", "OpenVINO": "#0072b2", OTHERS: "#8a8a8a"}
GAP = 0.8  # between works, in bars


@dataclass
class Result:
    """What was measured on one processor. ``sections`` says of each section when and at which commit it ran."""

    processor: dict[str, Any]  # name, title, slug, threads, platform
    versions: dict[str, str]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)  # date, commit, rounds, minutes
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.processor['title']}, {self.processor['threads']} threads"

    def row(self, work: str) -> Row | None:
        return next((row for row in self.rows if row.work == work), None)

    def to_json(self) -> str:
        date = max(section["date"] for section in self.sections.values())
        rows = [asdict(row) | {"ratios": row.ratios} for row in self.rows]
        return json.dumps({"date": date} | asdict(self) | {"rows": rows}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        data = json.loads(text)
        del data["date"]
        rows = [Row(**{key: value for key, value in row.items() if key != "ratios"}) for row in data.pop("rows")]
        return cls(**data, rows=rows)


def mergeable(path: Path, new: Result, sections: Collection[str]) -> Result | None:
    """The result in a file, if it holds sections that a run of ``sections`` does not measure anew.

    Raises:
        SystemExit: if the file was measured on another machine or with other versions.
    """
    if not path.exists():
        return None
    old = Result.from_json(path.read_text(encoding="utf-8"))
    if set(old.sections) <= set(sections):
        return None
    if (old.processor, old.versions) != (new.processor, new.versions):
        raise SystemExit(
            f"benchmarks: {path} has other sections, of another machine or other versions: run all sections"
        )
    return old


def merge(old: Result, new: Result, order: Sequence[str]) -> Result:
    """The new sections in their places among the old ones."""
    rows = [row for name in order for row in (new if name in new.sections else old).rows if row.section == name]
    sections = old.sections | new.sections
    return Result(new.processor, new.versions, {name: sections[name] for name in order if name in sections}, rows)


def read_results(folder: Path, kind: str = "cpu") -> list[Result]:
    """The results of all processors, the ones with most rows first."""
    paths = sorted(folder.glob(f"{kind}-*.json"))
    results = [Result.from_json(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(results, key=lambda result: -len(result.rows))


# -- tables -----------------------------------------------------------------------------------------------------------


def works_of(results: Iterable[Result]) -> list[str]:
    """Every work once, in the order of the first result; later results add theirs behind the same section."""
    works: list[str] = []
    sections: list[str] = []
    for result in results:
        for row in result.rows:
            if row.work in works:
                continue
            place = len(works) - sections[::-1].index(row.section) if row.section in sections else len(works)
            works.insert(place, row.work)
            sections.insert(place, row.section)
    return works


def times(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio >= 20 else f"{ratio:.1f}×" if ratio >= 10 else f"{ratio:.2f}×"


def amount(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms" if value >= 0.1 else f"{1e3 * value:.1f} ms"


def cell(row: Row | None, peers: Collection[str] | None = None) -> str:
    """The ratios to all peers, or to some. With all, miniclip's own seconds or bytes come first."""
    if row is None or row.missing:
        return f"not measured: {row.missing}" if row else "not measured"
    ratios = [f"{times(ratio)} {peer}" for peer, ratio in row.ratios.items() if peers is None or peer in peers]
    if peers is None:
        ratios.insert(0, amount(row.turns[0]["miniclip"], row.unit))
    return "; ".join(ratios) or "not measured"


def table(results: Sequence[Result], small: bool = False) -> str:
    """One row per work, one column per processor."""
    works = works_of(results)
    if small:
        works = [work for work in SMALL if work in works]
    titles = [result.title for result in results]
    lines = [f"| work | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for work in works:
        cells = [cell(result.row(work), SMALL[work] if small else None) for result in results]
        lines.append(f"| {work} | {' | '.join(cells)} |")
    return "\n".join(lines)


def facts(result: Result) -> str:
    """When, where and with which versions a column was measured, as a Markdown list item."""
    runs: dict[tuple[str, str], list[str]] = {}
    for name, section in result.sections.items():
        runs.setdefault((section["date"], section["commit"]), []).append(name)
    when = "; ".join(f"{', '.join(names)} on {date} at {commit}" for (date, commit), names in runs.items())
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items() if name != "miniclip")
    notes = [f"{row.work}: {row.note}." for row in result.rows if row.note]
    return " ".join([f"- **{result.title}** ({result.processor['name']}): {when}. {versions}.", *result.notes, *notes])


def markdown(folder: Path, small: bool, chart: str) -> str:
    """The table, and for the full one the facts and the GPUs' table."""
    results = read_results(folder)
    parts = [table(results, small), f"![miniclip beside its peers: how many times as fast]({chart})"]
    if not small:
        parts.append("\n".join(map(facts, results)))
        if gpus := read_results(folder, "cuda"):
            parts += [table(gpus), "\n".join(map(facts, gpus))]
    return "\n\n".join(parts)


def between_markers(text: str, content: str, name: str) -> str:
    """A page with ``content`` between its two marker comments.

    Raises:
        SystemExit: if the page does not have each marker once, in order.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end) or BEGIN in tail or END in tail:
        raise SystemExit(f"benchmarks: {name} needs one {BEGIN} and one {END}")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def write_report(folder: Path, root: Path = ROOT) -> list[Path]:
    """Write the chart, and the tables into the pages that exist. Returns the files written.

    Raises:
        SystemExit: if there are no results, or a page lacks the markers.
    """
    results, chart = read_results(folder), root / CHART
    if not results:
        raise SystemExit(f"benchmarks: {folder} holds no cpu-*.json")
    chart.parent.mkdir(parents=True, exist_ok=True)
    draw(results, chart)
    written = [chart]
    for name, small, figure in (("README.md", True, CHART.as_posix()), ("docs/speed.md", False, "figures/speed.png")):
        path = root / name
        if path.exists():
            page = between_markers(path.read_text(encoding="utf-8"), markdown(folder, small, figure), name)
            path.write_text(page, encoding="utf-8")
            written.append(path)
    return written


# -- the chart --------------------------------------------------------------------------------------------------------


def draw(results: Sequence[Result], path: Path) -> None:
    """Horizontal bars of the ratios, grouped by work, one colour per peer, one column of panels per processor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    works = [work for work in works_of(results) if work.removesuffix(", bfloat16") not in TABLE_ONLY]
    works = [work for work in works if any(bars_of(result, work) for result in results)]
    is_image = [" images, batch " in work for work in works]
    groups = [[work for work, flag in zip(works, is_image) if flag == kind] for kind in (True, False)]
    groups = [group for group in groups if group]
    heights = [sum(slots(results, work) + GAP for work in group) for group in groups]
    figure, grid = plt.subplots(
        len(groups),
        len(results),
        figsize=(3.4 + 3.5 * len(results), 0.16 * sum(heights) + 0.55 * len(groups) + 0.7),
        dpi=160,
        sharex="row",
        sharey="row",
        layout="constrained",
        height_ratios=heights,
        squeeze=False,
    )
    for row, group in zip(grid, groups):
        for axes, result in zip(row, results):
            draw_panel(axes, results, result, group)
            set_scale(axes, log=" images, batch " not in group[0])
    for axes, result in zip(grid[0], results):
        axes.set_title(result.title.replace(", ", "\n", 1), fontsize=8.5)
    for axes in grid[-1]:
        axes.set_xlabel("peer's time or memory ÷ miniclip's", fontsize=8)
    used = {family_of(peer) for result in results for work in works for peer, _ in bars_of(result, work)}
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items() if name in used]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)
    figure.savefig(path, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def draw_panel(axes: Any, results: Sequence[Result], result: Result, works: Sequence[str]) -> None:
    """The bars of one processor. A work has as many slots as it has peers on any processor."""
    place, middles = 0.0, []
    for work in works:
        count = slots(results, work)
        middles.append(place + (count - 1) / 2)
        bars = bars_of(result, work)
        for number, (peer, ratio) in enumerate(bars):
            family = family_of(peer)
            axes.barh(place + number, ratio - 1, left=1, height=0.84, color=COLOURS[family])
            variant = peer if family == OTHERS else peer.removeprefix(family).strip(" ,()")
            axes.annotate(
                f"{times(ratio)}  {variant}".rstrip(),
                (max(ratio, 1), place + number),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6.5,
            )
        if not bars:
            row = result.row(work)
            reason = "not measured" if row is None else row.missing or "measured without a peer"
            axes.annotate(
                reason,
                (1, middles[-1]),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6.5,
                color="0.5",
                style="italic",
            )
        place += count + GAP
    axes.set_yticks(middles, works, fontsize=7.5)
    axes.set_ylim(place - GAP, -1)


def bars_of(result: Result, work: str) -> list[tuple[str, float]]:
    row = result.row(work)
    return [*row.ratios.items()] if row else []


def slots(results: Sequence[Result], work: str) -> int:
    return max(len(bars_of(result, work)) for result in results)


def family_of(peer: str) -> str:
    return next((name for name in COLOURS if peer.startswith(name)), OTHERS)


def set_scale(axes: Any, log: bool) -> None:
    if log:
        axes.set_xscale("log")
        ticks, limits = [0.5, 1, 2, 5, 10, 20, 50], (0.3, 2000)
    else:
        right = max(3.0, axes.get_xlim()[1])
        ticks, limits = [0.5, 1, 1.5, 2, 2.5, 3], (0.5, right + 0.4)
    axes.set_xlim(*limits)
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks], fontsize=7.5)
    axes.minorticks_off()
    axes.axvline(1, color="0.25", linewidth=0.8)
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
