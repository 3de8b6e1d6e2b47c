"""Files in, files out: results.json and per_image.csv, and from them and the pictures report.html, grid.png, tables.

`python -m eval.report OUT` draws the report anew; with --markdown it prints the table for a README instead, with
--against ROW each method's difference from that one, and --grid draws some of the pictures.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import jsonschema
import markupsafe
from jsonschema.exceptions import best_match
from PIL import Image, ImageChops, ImageDraw, ImageFont

from . import EvalError, frontier, plots, spreadsheet
from .files import check_place, listed, parse_json, png, read_json, read_text, to_json, write
from .generate import Settings
from .maps import FOLDER, fit
from .methods import FULL
from .options import Help, Parser, as_path, at_least, command
from .score import Scores
from .table import circumstances, commits, label, markdown, markdown_against, notes, table, with_rows

SCHEMA = 1
RESULTS, PER_IMAGE = "results.json", "per_image.csv"
FIELDS = ("method", "key", "id", "prompt", "seed", "seconds")  # of the table, before the metrics
AGAIN = "the same command of eval.run writes it again"
PAIRS = 10  # the worst and the best of each method
GRID_ROWS = 6
TIMES = ("seconds", "denoising", "speedup", "beside", "of_one_run")  # of a row
THUMBNAIL, SMALL, MANY = 512, 160, 8  # pixels, at most; small ones for more methods than so many: a page must open
THREE = 1600  # of three pictures side by side
MAGNIFY = 4  # of the difference pictures


# --- writing the figures ---------------------------------------------------------------------------------------------


def results(
    settings: Settings, scores: Scores, metrics: list[dict[str, Any]], provenance: dict[str, Any], of: int
) -> dict[str, Any]:
    """What results.json holds. of: how many pictures the whole list of prompts asks for."""
    n = next(row["n"] for row in scores.rows if "n" in row)
    return {
        "schema": SCHEMA,
        "settings": {**asdict(settings), "n": n, "of": of},
        "metrics": metrics,
        "rows": scores.rows,
        "provenance": provenance,
    }


def save(out: Path, found: dict[str, Any], scores: Scores) -> dict[str, Any]:
    """Writes the figures, then everything that is drawn from them; returns what results.json holds.

    It goes last and names the table's hash: of a run that is killed between the two neither passes for whole.
    """
    names = [metric["name"] for metric in found["metrics"] if metric.get("per_image")]
    content = spreadsheet.to_csv([*FIELDS, *names], scores.images)
    found = {**found, "per_image_sha256": spreadsheet.digest(content)}
    write(out / PER_IMAGE, content)
    write(out / RESULTS, to_json(found))
    draw(out)
    return found


def draw(out: Path) -> None:
    """report.html and grid.png from the files in `out`."""
    found, images = read(out)
    write(out / "grid.png", png(grid(out, found, images, GRID_ROWS)))
    write(out / "report.html", html(out, found, images))


def read(out: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """(results.json, the rows of per_image.csv). EvalError where they are not there, or not of one run."""
    if not (out / RESULTS).exists():
        raise EvalError(f"{out.name} holds no {RESULTS}: python -m eval.run --out {out.name} writes one")
    try:
        found = parse_json(read_text(out / RESULTS))
    except OSError as error:
        raise EvalError(f"cannot read {out.name}/{RESULTS}: {error.strerror}") from error
    except ValueError as error:
        raise EvalError(f"{out.name}/{RESULTS} is damaged: it holds no JSON: {AGAIN} ({error})") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise EvalError(f"{out.name}/{RESULTS} has schema {schema}, this program reads {SCHEMA}")
    wrong = best_match(_schema().iter_errors(found))
    if wrong is not None:
        at = "".join(f"[{part!r}]" for part in wrong.absolute_path)
        message = " ".join(wrong.message.split())[:200]
        raise EvalError(f"{out.name}/{RESULTS} is damaged: {at and f'in {at} '}{message}: {AGAIN}")
    rows = [row for row in found["rows"] if "skipped" not in row]
    if not any(row["key"] == FULL.key for row in rows):
        raise EvalError(f"{out.name}/{RESULTS} is damaged: it has no row of the full model: {AGAIN}")
    for figure in (figure for row in rows for figure in row["metrics"].values()):
        ends = [figure["low"] is None, figure["high"] is None]
        if ends[0] != ends[1] or (figure["value"] is None and not all(ends)):
            raise EvalError(f"{out.name}/{RESULTS} is damaged: it has one end of an interval: {AGAIN}")
    images = _images(out, found)
    ids = {row["key"]: sorted(image["id"] for image in images if image["key"] == row["key"]) for row in rows}
    if other := [key for key, own in ids.items() if own != ids[FULL.key] or not own]:
        raise EvalError(f"{out.name}: {PER_IMAGE} lacks images of {listed(other)}, which {RESULTS} has: {AGAIN}")
    return found, images


def _images(out: Path, found: dict[str, Any]) -> list[dict[str, str]]:
    """The rows of per_image.csv. EvalError where it is not the table of these results."""
    try:
        content = read_text(out / PER_IMAGE)
        rows, digest = spreadsheet.from_csv(content), spreadsheet.digest(content)
    except FileNotFoundError as error:
        raise EvalError(f"{out.name} has lost its {PER_IMAGE}: {AGAIN}") from error
    except OSError as error:
        raise EvalError(f"cannot read {out.name}/{PER_IMAGE}: {error.strerror}") from error
    except ValueError as error:
        raise EvalError(f"{out.name}/{PER_IMAGE} cannot be read: {error}: {AGAIN}") from error
    if found.get("per_image_sha256") not in (None, digest):  # older ones do not name it
        raise EvalError(f"{out.name}: {RESULTS} and {PER_IMAGE} are of two runs, or the table was edited: {AGAIN}")
    numbers = [metric["name"] for metric in found["metrics"] if metric.get("per_image")]
    lacking = [name for name in (*FIELDS, *numbers) if rows and name not in rows[0]]
    if not rows or lacking:
        raise EvalError(f"{out.name}/{PER_IMAGE} has no {f'column {lacking[0]!r}' if lacking else 'rows'}: {AGAIN}")
    for number, row in enumerate(rows, start=2):
        for name in numbers:
            if row[name] and not _is_number(row[name]):
                raise EvalError(f"{out.name}/{PER_IMAGE}, row {number}: {name} is {row[name]!r}, no number: {AGAIN}")
    return rows


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@cache
def _schema() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(read_json(Path(__file__).parent / "results.schema.json"))


def alike(a: Path, first: dict[str, Any], b: Path, second: dict[str, Any], names: Sequence[str]) -> None:
    """EvalError where the figures of two runs must not stand side by side: settings of these names, or how a metric is
    measured, differ."""
    cannot = f"{a.name} and {b.name} cannot be compared"
    for name in names:
        ours, theirs = (found["settings"].get(name) for found in (first, second))
        untold = name == "tokenizers" and None in (ours, theirs)  # by an older run
        if ours != theirs and not untold:
            raise EvalError(f"{cannot}: {name} is {ours!r} in one, {theirs!r} in the other")
    measured = {m["name"]: m["implementation"] for m in first["metrics"] if "skipped" not in m}
    for metric in second["metrics"]:
        mine = measured.get(metric["name"])
        if "skipped" not in metric and mine is not None and mine != metric["implementation"]:
            raise EvalError(
                f"{cannot}: {metric['name']} is measured by {mine} in one, by {metric['implementation']} in the other; "
                "measure one of them again with --metrics-only"
            )


def joined(outs: Sequence[Path]) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The rows of several runs of the same settings as those of one; of a method that two have, the first one's.

    A row keeps the speed-up over the full model of its own run, beside which its seconds are of another one. EvalError
    where settings differ.
    """
    found, images = read(outs[0])
    for out in outs[1:]:
        other, its_images = read(out)
        alike(outs[0], found, out, other, list(found["settings"]))
        ids, others = ({image["id"] for image in some} for some in (images, its_images))
        if ids != others:
            raise EvalError(f"{outs[0].name} and {out.name} are of other pictures: {listed(sorted(ids ^ others))}")
        if (mine := _measured(found)) != (its := _measured(other)):
            raise EvalError(
                f"{outs[0].name} and {out.name} cannot be compared: {', '.join(sorted(mine ^ its))} is measured in "
                "one alone; measure the other again with --metrics-only"
            )
        keys = {row["key"] for row in found["rows"] if "skipped" not in row}
        own = {row["key"] for row in other["rows"] if "skipped" not in row}
        more = [{**row, "of_one_run": False} for row in other["rows"] if row["key"] in own - keys]
        told, also = found["provenance"], other["provenance"]
        tokenizers = [name for run in (found, other) if (name := run["settings"].get("tokenizers"))]  # older: untold
        found = {
            **found,
            "settings": {**found["settings"], "tokenizers": tokenizers[0] if tokenizers else None},
            "rows": [
                *(row for row in found["rows"] if row["key"] in keys or row["key"] not in own),
                *more,
            ],
            "provenance": {
                **told,
                "drawn": [*(told.get("drawn") or [told]), *(also.get("drawn") or [also])],
                "joined": [*told.get("joined", []), also["command"]],
            },
        }
        images += [image for image in its_images if image["key"] not in keys]
    return found, images


def with_times(found: dict[str, Any], out: Path, times: Path) -> dict[str, Any]:
    """The results of `out` with the times of another run of the same settings, whatever its machine and its number of
    pictures: the same pictures come of any machine, up to rounding, but not in the same time.

    For a grid that grew by several runs: one in which all its methods took turns tells how fast they are. A row that it
    has not timed has no times. EvalError where settings differ.
    """
    other, _ = read(times)
    alike(out, found, times, other, [name for name in found["settings"] if name not in ("n", "of", "device")])
    timed = {row["key"]: row for row in other["rows"]}
    rows = [
        row if "skipped" in row else {**row, **dict.fromkeys(TIMES), **_times(timed.get(row["key"], {}))}
        for row in found["rows"]
    ]
    told = found["provenance"]
    joined = [*told.get("joined", []), other["provenance"]["command"]]
    timing = {"commit": commits(other), "device": other["settings"]["device"]}
    return {**found, "rows": rows, "provenance": {**told, "joined": joined, "timing": timing}}


def _times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in TIMES if name in row}


def _measured(found: dict[str, Any]) -> set[str]:
    return {metric["name"] for metric in found["metrics"] if "skipped" not in metric}


# --- pictures --------------------------------------------------------------------------------------------------------


def ranking(found: dict[str, Any]) -> dict[str, Any] | None:
    """The metric that pairs are sorted by: the most perceptual one there is."""
    there = {m["name"]: m for m in found["metrics"] if m.get("per_image") and m["name"] != "classed as asked"}
    names = [name for name in there if name.startswith("LPIPS")] + ["PD-judge", "MS-SSIM", "PSNR"]
    return next((there[name] for name in names if name in there), None)


def worst_first(images: Sequence[dict[str, str]], metric: dict[str, Any] | None) -> list[dict[str, str]]:
    """Pairs by falling distance; in their own order where nothing was measured."""
    if metric is None:
        return list(images)
    sign = -1 if metric["lower_is_better"] else 1
    return sorted(images, key=lambda image: sign * float(image[metric["name"]]))


def html(out: Path, found: dict[str, Any], images: list[dict[str, str]]) -> str:
    columns, rows = table(found)
    metric = ranking(found)
    measured = [m for m in found["metrics"] if m.get("per_image")]
    sections = []
    compared = [row for row in found["rows"] if "skipped" not in row and row["key"] != FULL.key]
    side = THUMBNAIL if len(compared) <= MANY else SMALL
    for row in compared:
        own = worst_first([image for image in images if image["key"] == row["key"]], metric)
        worst = own[:PAIRS]
        best = own[max(len(worst), len(own) - PAIRS) :][::-1] if metric else []
        pairs = [[_pair(out, image, measured, side) for image in some] for some in (worst, best)]
        merged = _embedded(_open(out / FOLDER / f"{row['key']}.png"), THREE) if row.get("maps") else None
        sections.append({"row": row, "of": len(own), "worst": pairs[0], "best": pairs[1], "maps": merged})
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    try:
        costs: str | None = frontier.svg(found)
        cost, by, front = frontier.best(found)
    except EvalError:  # too few methods for one
        costs, front = None, []
    drawn = [
        {"title": title, "about": about, "svg": markupsafe.Markup(svg)}
        for title, about, svg in (
            ("Quality against cost", "Each point a method, with the 95 % interval of its metric; the line joins those "
             "that no other beats in both.", costs),
            ("Picture by picture", "How the metrics are spread over the pictures: the box holds the middle half, its "
             "line the median, the whiskers 90 %.", plots.distributions(found, images)),
        )
        if svg
    ]  # fmt: skip
    return page.get_template("report.html.j2").render(
        plots=drawn, found=found, columns=columns, rows=rows, sections=sections, ranked_by=metric, magnify=MAGNIFY,
        label=label, circumstances=circumstances(found), notes=notes(found), many=MANY,
        front={point.row["key"] for point in front}, front_of=f"{cost.title} and {by['name']}" if front else "",
    )  # fmt: skip


def _pair(out: Path, image: dict[str, str], measured: list[dict[str, Any]], side: int) -> dict[str, Any]:
    full, own = (_open(out / key / f"{image['id']}.png") for key in (FULL.key, image["key"]))
    difference = ImageChops.difference(full, own).point(lambda level: min(255, MAGNIFY * level))
    figures = {m["name"]: f"{float(image[m['name']]):.{m['digits']}f}" for m in measured if image[m["name"]]}
    return {**image, "figures": figures, "pictures": [_embedded(picture, side) for picture in (full, own, difference)]}


def grid(out: Path, found: dict[str, Any], images: list[dict[str, str]], first: int) -> Image.Image:
    """The `first` prompts, a row each; the full model and the methods, a column each."""
    rows = [row for row in found["rows"] if "skipped" not in row]
    shown = [image for image in images if image["key"] == FULL.key][:first]
    side, gap, head, caption = min(256, found["settings"]["size"]), 8, 28, 20
    width = gap + len(rows) * (side + gap)
    picture = Image.new("RGB", (width, head + len(shown) * (caption + side + gap)), "white")
    pen, bold, small = ImageDraw.Draw(picture), ImageFont.load_default(15), ImageFont.load_default(11)
    for i, row in enumerate(rows):
        pen.text((gap + i * (side + gap), 6), fit(label(row), bold, side), fill="black", font=bold)
    for j, image in enumerate(shown):
        top = head + j * (caption + side + gap)
        pen.text((gap, top + 2), fit(image["prompt"], small, width - 2 * gap), fill="dimgray", font=small)
        for i, row in enumerate(rows):
            tile = _open(out / row["key"] / f"{image['id']}.png").resize((side, side), Image.Resampling.LANCZOS)
            picture.paste(tile, (gap + i * (side + gap), top + caption))
    return picture


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        why = "is gone" if isinstance(error, FileNotFoundError) else "is damaged"
        again = "the same command of eval.run draws it again"
        raise EvalError(f"the picture {path.parent.name}/{path.name} {why}: {again}") from error


def _embedded(image: Image.Image, most: int) -> str:
    """A data: address of the picture: JPEG, for the eye alone (figures come from the PNGs)."""
    image.thumbnail((most, most))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


EXAMPLES = """examples:
  python -m eval.report runs/try
      report.html and grid.png anew
  python -m eval.report runs/try --markdown --rows full 'tofu 50%' --columns speed-up LPIPS-alex
      a part of the table, for a page
  python -m eval.report runs/try --against 'tome 50%'
      how far every method is from that one, picture by picture
  python -m eval.report runs/half runs/quarter --frontier
      the methods that no other beats in both cost and quality, and the call for each, of two runs of the same settings
  python -m eval.report runs/half runs/quarter --times runs/speed --plot frontier.svg
      the same as a drawing, by the times of a third run, in which all their methods took turns
"""
TAKES = {  # what of --rows, --columns, --by, --times and --first the parts of a report take
    "markdown": ("rows", "columns", "times"), "against": ("rows",), "grid": ("rows", "first"),
    "frontier": ("by", "times"), "plot": ("rows", "times"),
}  # fmt: skip


def parser() -> Parser:
    p = Parser(
        prog="python -m eval.report",
        description="Draw the report of a run anew, or print or draw a part of it.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    p.add_argument(
        "out", type=as_path, nargs="+", help="folder of eval.run; several of the same settings for a table or plot"
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument("--markdown", action="store_true", help="print the table for a README, write nothing")
    what.add_argument("--against", metavar="ROW", help="print how each row differs from this one, say 'tome 50%%'")
    what.add_argument("--frontier", action="store_true", help="print the methods that no other beats in both, and how")
    what.add_argument("--plot", type=as_path, metavar="FILE", help="write quality against cost as a drawing, as SVG")
    what.add_argument("--grid", type=as_path, metavar="FILE", help="write the pictures of --rows side by side, as PNG")
    p.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="of the table, say full 'tofu 50%%'")
    p.add_argument("--columns", nargs="+", default=[], metavar="TITLE", help="of the table, say speed-up PSNR")
    p.add_argument("--by", choices=list(frontier.COSTS), help="the cost of --frontier (default: the first it has)")
    p.add_argument(
        "--times",
        type=as_path,
        metavar="DIR",
        help="take the times of this run of the same settings, of any machine",
    )
    p.add_argument("--first", type=at_least(1), metavar="N", help=f"so many prompts in the grid ({GRID_ROWS})")
    return p


@command(goes_on=False)
def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    part = next((name for name in TAKES if getattr(options, name)), "")
    for name in ("rows", "columns", "by", "times", "first"):
        if getattr(options, name) and name not in TAKES.get(part, ()):
            raise EvalError(f"--{name} says nothing of {f'--{part}' if part else 'the whole report'}")
    out = options.out[0]
    for name in ("plot", "grid"):
        if (place := getattr(options, name)) is not None:
            check_place(place, f"--{name}")
    if len(options.out) > 1 and part in ("", "grid"):
        raise EvalError(f"{'--grid' if part else 'the whole report'} shows the pictures of one folder")
    found, images = joined(options.out)
    if options.times:
        found = with_times(found, out, options.times)
    found = with_rows(found, options.rows)
    if options.against is not None:
        print(markdown_against(found, images, options.against), end="")
    elif options.markdown:
        print(markdown(found, options.columns), end="")
    elif options.frontier:
        print(frontier.markdown(found, options.by), end="")
    elif options.plot:
        write(options.plot, frontier.svg(found))
    elif options.grid:
        write(options.grid, png(grid(out, found, images, options.first or GRID_ROWS)))
    else:
        draw(out)
        print(f"wrote {out / 'report.html'} and {out / 'grid.png'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
