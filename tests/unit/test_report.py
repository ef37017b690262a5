"""The report page: exact charts and figures, words escaped, nothing loaded, at any time of a run."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tuner import chart, log, report
from tuner.errors import UserError

PLANTED = "<script>alert('&')</script>"
VOID = {"meta", "link", "img", "br", "hr", "input"}
RECIPE = """\
# resolved
base: {path: tuner/embedded}
method: {controlnet: {condition: canny}}
data: {source: [{path: datasets/shapes}], resolution: 128}
train: {steps: 1500, batch_size: 32, precision: bf16}
output: runs/edges
"""


class Page(HTMLParser):
    """The page's tags, attributes and visible text; fails where tags are not balanced."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(path: Path, colour: str, size: tuple[int, int] = (24, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_run(output: Path, text: str = "plain") -> None:
    """A finished run with everything in it; `text` stands wherever data may bring words."""
    with log.Log(output, False, None, True, None) as written:
        for step in range(1, 51):
            values = {
                "loss": 1 / step,
                "learning_rate": 1e-4,
                "images_per_second": 33.0,
                "seconds": 15.0 * step,
            }
            written.scalars(step, {**values, text: 2.0})
        written.event(40, text)
        rows = {f"{text} (floor)": [0.112, 0.3], "right prompt": [0.5123, 0.8]}
        table = {"verdict": f"{text}!", "columns": ["strict", text], "rows": rows, "pictures": 64}
        written.measures(f"F1 {text}", {**table, "picture": "evaluation/edges.png"})
        written.measures("flat", {"colour right": 0.93, "samples": 1200, text: text})
        written.event(50, log.FINISHED)
    (output / "recipe.yaml").write_text(RECIPE + f'note: "{text}"\n')
    picture(output / "evaluation/edges.png", "red")
    picture(output / "evaluation/more.png", "blue")
    for step, colour in ((20, "green"), (100, "white"), (9, "black")):
        picture(output / f"previews/step-{step:06d}.png", colour)
    said = {"prompts": [text, ""], "columns": ["condition", text]}
    (output / "previews/step-000100.json").write_text(json.dumps(said))
    (output / "versions.json").write_text(json.dumps({"torch": "2.13.0", text: text}))
    (output / "export/diffusers").mkdir(parents=True)
    (output / "export/diffusers/config.json").write_text('{"_class_name": "ControlNetModel"}')
    weights = {"a": torch.zeros(2), "b": torch.zeros(3)}
    save_file(weights, output / "export/diffusers/diffusion_pytorch_model.safetensors")
    save_file({"<toy>": torch.zeros(2, 8)}, output / "export/toy.safetensors")


def test_the_page_is_balanced_and_says_everything(tmp_path: Path) -> None:
    write_run(tmp_path / "edges")
    path = report.write(tmp_path / "edges")
    assert path == tmp_path / "edges/report.html"
    assert not list(path.parent.glob("*.part"))
    page = Page(path)
    said = [
        "edges finished",
        "Method ControlNet Base tuner/embedded Data datasets/shapes Resolution 128 px Steps 1,500",
        "Time used 12:30",
        "F1 plain plain! strict plain plain (floor) 0.112 0.300 right prompt 0.512 0.800 pictures: 64",
        "colour right 0.930 samples 1,200",
        "Step 100 Columns: condition, plain Row 1: plain Row 2: (no prompt)",
        "2 earlier",
        "1 step 40 plain",
        'controlnet = ControlNetModel.from_pretrained("runs/edges/export/diffusers")',
        'pipeline.load_textual_inversion("runs/edges/export/toy.safetensors", token="<toy>")',
        "torch 2.13.0",
        "# resolved base: {path: tuner/embedded}",
    ]
    missing = [words for words in said if words not in page.text]
    assert not missing
    assert "Not there yet" not in page.text
    assert len(page.named("svg")) == 4  # loss, learning rate, speed and one more; not the seconds
    assert [attributes["class"] for attributes in page.named("tr") if "class" in attributes] == ["bound"]


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = Page(report.write(tmp_path))
    loading = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "xlink:href", "action")
    ]
    assert len(loading) == 6  # 5 pictures and the empty icon
    assert all(value is not None and value.startswith("data:") for value in loading)
    assert not page.named("script") and not page.named("iframe")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    source = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\((?!#)", source)
    assert "default-src 'none'" in source


def test_pictures_are_inlined_as_they_are_newest_first(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = Page(report.write(tmp_path))
    inlined = [base64.b64decode((image["src"] or "").split(",")[1]) for image in page.named("img")]
    files = ["evaluation/edges", "evaluation/more"] + [f"previews/step-{step:06d}" for step in (100, 20, 9)]
    assert inlined == [(tmp_path / f"{name}.png").read_bytes() for name in files]
    assert {(image["width"], image["height"]) for image in page.named("img")} == {("24", "16")}


def test_a_heavy_picture_is_inlined_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "HEAVY", 100)
    monkeypatch.setattr(report, "LONG_SIDE", 32)
    picture(tmp_path / "previews/step-000001.png", "red", size=(400, 200))
    (image,) = Page(report.write(tmp_path)).named("img")
    kind, encoded = (image["src"] or "").split(";base64,")
    assert kind == "data:image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (32, 16)
    assert (image["width"], image["height"]) == ("400", "200")


def test_words_from_data_are_never_markup(tmp_path: Path) -> None:
    write_run(tmp_path / "run", text=PLANTED)
    page = Page(report.write(tmp_path / "run"))
    source = (tmp_path / "run/report.html").read_text()
    assert "<script" not in source and not page.named("script")
    # recipe; measure: name, verdict, column, row, key, value; preview: column, prompt; event: in the list
    # and in 4 charts; version: name and number
    assert page.text.count(PLANTED) == 1 + 6 + 2 + 5 + 2
    # beyond these the title of a chart and its label (with spaces around "/"), and the picture's alt text
    assert source.count("&lt;script&gt;") == 16 + 3


def test_an_empty_folder_and_a_started_run_have_a_page(tmp_path: Path) -> None:
    page = Page(report.write(tmp_path))
    assert "Not there yet: recipe, curves, figures, previews, exports, versions." in page.text
    assert "unfinished, at step 0" in page.text
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1234, "loss": 0.5}\n{"step": 12')
    page = Page(report.write(tmp_path))
    assert "unfinished, at step 1,234 of 1,500" in page.text
    assert "Not there yet: figures, previews, exports, versions." in page.text
    assert len(page.named("svg")) == 1


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: [1")
    (tmp_path / "previews/step-000100.png").write_bytes(b"\x89PNG")
    (tmp_path / "previews/step-000020.json").write_text("{")
    (tmp_path / "versions.json").write_text("{")
    (tmp_path / "export/half.safetensors").write_bytes(b"\0" * 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"measure": "m", "values": {"a": 1, "picture": "../outside.png"}}\n')
    picture(tmp_path.parent / "outside.png", "red")
    page = Page(report.write(tmp_path))
    names = [
        "recipe.yaml",
        "previews/step-000100.png",
        "step-000020.json",
        "versions.json",
        "half.safetensors",
        "../outside.png",
    ]
    problems = [attributes for attributes in page.named("p") if attributes.get("class") == "problem"]
    assert len(problems) == len(names)
    assert not [name for name in names if name not in page.text]
    assert len(page.named("img")) == 4


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(UserError, match=f"{name}: no such folder; expected the one that a run wrote to"):
            report.write(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "keys", "kind", "tools"),
    [
        (
            "style",
            ["lora_unet_x.lora_up.weight", "lora_unet_x.alpha"],
            "LoRA",
            ["diffusers", "ComfyUI", "A1111"],
        ),
        ("loha", ["lora_unet_x.hada_w1_a"], "LoRA", ["ComfyUI", "A1111"]),
        ("peft", ["unet.x.lora_A.weight"], "LoRA, peft names", ["diffusers"]),
        ("control_sd15_x", ["zero_convs.0.0.weight", "input_blocks.0"], "ControlNet", ["ComfyUI", "A1111"]),
        ("both", ["lora_unet_x.alpha", "bundle_emb.toy.clip_l"], "LoRA", ["ComfyUI", "A1111"]),
        ("whole", ["model.diffusion_model.out.2.bias", "x"], "checkpoint", ["ComfyUI", "A1111"]),
        ("toy", ["<toy>"], "embedding", ["diffusers", "ComfyUI", "A1111"]),
        ("toy_xl", ["clip_l", "clip_g"], "embedding", ["ComfyUI", "A1111"]),
        ("other", ["a", "b"], "tensors", []),
    ],
)
def test_exports_say_how_to_load_them(
    tmp_path: Path, name: str, keys: list[str], kind: str, tools: list[str]
) -> None:
    for folder in ("export", "export/step-20"):
        (tmp_path / folder).mkdir()
        save_file({key: torch.zeros(1) for key in keys}, tmp_path / folder / f"{name}.safetensors")
    final, early = sorted(report._exports(tmp_path, {}, []), key=lambda export: export.of_step)
    assert (final.path, early.path) == (f"{name}.safetensors", f"step-20/{name}.safetensors")
    assert (final.of_step, early.of_step) == (False, True)
    assert (final.kind, final.keys, [tool for tool, _ in final.uses]) == (kind, len(keys), tools)


# ---- charts


def test_the_path_of_known_values_is_exact() -> None:
    drawn = chart.line_chart("t", "", [(0, 0.0), (50, 4.0), (100, 2.0)], 100)
    # the plot spans x 50 to 428 over steps 0 to 100, y 194 to 16 over values 0 to 4
    assert drawn.raw == "M50 194 L239 16 L428 105"
    assert drawn.smooth == ""
    assert drawn.y_ticks == [(194, "0"), (149.5, "1"), (105, "2"), (60.5, "3"), (16, "4")]
    assert drawn.x_ticks == [
        (50, "0"),
        (125.6, "20"),
        (201.2, "40"),
        (276.8, "60"),
        (352.4, "80"),
        (428, "100"),
    ]
    assert (drawn.latest, drawn.note) == ("2.000", "")


def test_values_that_are_not_finite_leave_a_gap_and_are_counted() -> None:
    points = [(0, 0.0), (25, 4.0), (50, math.nan), (75, 4.0), (100, math.inf)]
    drawn = chart.line_chart("t", "", points, 100)
    assert drawn.raw == "M50 194 L144.5 16 M333.5 16h0"
    assert drawn.note == "2 of 5 values not finite"
    alone = chart.line_chart("t", "", [(1, math.nan)], 1)
    assert (alone.raw, alone.latest, alone.note) == ("", "nan", "1 of 1 values not finite")


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-8, 1e9])
def test_a_constant_stands_in_the_plot(value: float) -> None:
    drawn = chart.line_chart("t", "", [(1, value), (2, value)], 2)
    found = re.fullmatch(r"M239 ([\d.]+) L428 ([\d.]+)", drawn.raw)
    assert found and found[1] == found[2]
    assert 16 <= float(found[1]) <= 194
    assert len({text for _, text in drawn.y_ticks}) == len(drawn.y_ticks) >= 3


def test_events_are_marked_where_they_were() -> None:
    drawn = chart.line_chart("t", "", [(0, 0.0), (100, 1.0)], 100, [(50, "jump"), (100, "end")])
    assert drawn.marks == [(239, "1", "jump"), (428, "2", "end")]


def test_a_spike_does_not_flatten_a_smoothed_course_and_is_counted() -> None:
    points = [(step, 1.0 + step % 2) for step in range(400)]
    points[50] = (50, 30.0)
    drawn = chart.line_chart("t", "", points, 399, smooth=True)
    assert drawn.smooth
    assert float(drawn.y_ticks[-1][1]) <= 6  # the smoothed course rises to 1.5 + 28.5 * 2 / 17 = 4.9
    assert drawn.note == "1 of 400 values beyond the axis"


def test_smoothing_is_the_exponential_mean() -> None:
    course = chart.smoothed([(1, 3.0), (2, math.nan), (3, 0.0)], span=3)  # weight of the past: 1/2
    assert course == [(1, 3.0), (3, pytest.approx(1.0, rel=1e-12))]
    constant = chart.smoothed([(step, 7.0) for step in range(40)], span=9)
    assert len(constant) == 40
    assert all(value == pytest.approx(7.0, rel=1e-12) for _, value in constant)


def test_long_lines_are_thinned_and_keep_their_extremes() -> None:
    points: list[tuple[int, float]] = [(step, math.sin(step)) for step in range(100_000)]
    points[77_777] = (77_777, 9.0)
    kept = chart._thin(points)
    assert 300 < len(kept) <= chart.MOST_POINTS
    assert (77_777, 9.0) in kept and min(points, key=lambda point: point[1]) in kept
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 100, [0, 50, 100]),
        (0.07, 0.13, [0.06, 0.08, 0.1, 0.12, 0.14]),
        (-3, 4, [-4, -2, 0, 2, 4]),
        (0, 1e-4, [0, 5e-5, 1e-4]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    assert chart.ticks(low, high, 4) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1500, "1,500"),
        (33.12, "33.1"),
        (0.0812, "0.0812"),
        (1e-4, "1e-4"),
        (2.5e-7, "2.5e-7"),
        (0.0, "0"),
        (-0.5, "-0.500"),
        (12345.6, "12,346"),
        (2e6, "2e6"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_read_well(value: Any, text: str) -> None:
    assert chart.number(value) == text
