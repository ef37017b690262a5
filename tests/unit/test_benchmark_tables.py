"""What turns the benchmarks' results into documents, and what reckons with many GPUs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULT = {
    "what": "growth",
    "machine": {"processor": "A", "cores": 2, "threads": 1, "memory_gib": 8.0, "gpu": None},
    "versions": {"torch": "2"},
    "date": "2030-01-02",
    "arguments": {"steps": 3, "json": "growth.json", "full": False},
    "rows": [{"n": 1, "time": {"all": 0.12345}, "same": "x"}, {"n": 2, "time": {"all": 2000.0}, "same": "x"}],
}


@pytest.fixture(scope="module")
def bench() -> Iterator[Callable[[str], ModuleType]]:
    """Imports files of benchmarks/ by name, as its scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module


def test_a_result_becomes_a_table(bench: Any) -> None:
    assert bench("tables").section(RESULT) == [
        "A, 2 cores, 1 thread, 8.0 GiB; torch 2; 2030-01-02. Arguments: steps 3.",
        "",
        "| n | time all |",
        "| --- | --- |",
        "| 1 | 0.1235 |",
        "| 2 | 2000 |",
        "",
        "In all rows: same x.",
    ]


def test_lines_go_between_markers_again_and_again(bench: Any) -> None:
    put, text = bench("tables").put, "a\n<!-- one: begin -->\n<!-- one: end -->\nb\n"
    once = put(text, {"one": ["1", "2"]})
    assert once == "a\n<!-- one: begin -->\n1\n2\n<!-- one: end -->\nb\n"
    assert put(once, {"one": ["3"]}) == "a\n<!-- one: begin -->\n3\n<!-- one: end -->\nb\n"


@pytest.mark.parametrize("sections", [{}, {"one": ["1"], "two": ["2"]}, {"two": ["2"]}])
def test_nothing_is_left_out_or_left_behind(bench: Any, sections: dict[str, list[str]]) -> None:
    with pytest.raises(SystemExit, match="markers"):
        bench("tables").put("<!-- one: begin -->\n<!-- one: end -->\n", sections)


def test_the_document_on_scaling_has_its_tables(bench: Any) -> None:
    found = [one["name"] for one in bench("tables").MARK.finditer((ROOT / "docs" / "scaling.md").read_text())]
    assert found == ["moved", "ddp", "fsdp", "measured"]


def test_times_of_moving_by_hand(bench: Any) -> None:
    paper = bench("scaling_paper")
    one = paper.Moved("sd15", "full", 512, 10**9, 4 * 10**9, 6 * 10**9, 3 * 10**9, 70, 1.0, 2.0)
    speed, hop = paper.LINKS["Ethernet 25 Gb/s"]
    buckets = 153  # of 25 MiB, in 4 GB
    ddp = 2 * 4e9 * 7 / 8 / speed + 2 * buckets * 3 * hop
    assert one.ddp(8, "Ethernet 25 Gb/s") == pytest.approx(ddp, rel=1e-12)
    sent, left = 6e9 + 3e9 + 2 * 1e9, 39  # buckets of what is not parted
    fsdp = sent * 63 / 64 / speed + (70 + 2 * left) * 6 * hop
    assert one.fsdp(64, "Ethernet 25 Gb/s") == pytest.approx(fsdp, rel=1e-12)
    assert one.picture(300.0) == pytest.approx(0.01)


@pytest.mark.parametrize("method", ["lora", "textual_inversion", "controlnet", "full"])
def test_bytes_are_those_of_the_products_networks(bench: Any, method: str) -> None:
    """Of the embedded base: 11.0 million numbers of the UNet, in bfloat16 where frozen."""
    found = bench("scaling_paper").moved("embedded", method)
    unet, branch = 11_032_068, 4_810_576
    trained = {"lora": 503_808, "textual_inversion": 256, "controlnet": branch, "full": unet}[method]
    assert found.trained == trained and found.gradients == 4 * trained
    assert found.parted == (found.gradients if method in ("controlnet", "full") else 0)
    once = {
        "lora": 2 * unet,
        "textual_inversion": 2 * unet,
        "controlnet": 2 * unet + 4 * branch,
        "full": 4 * unet,
    }
    assert once[method] < found.gathered < 2 * once[method]
    assert found.messages > 20 and 0 < found.forward < found.backward * 2.2
