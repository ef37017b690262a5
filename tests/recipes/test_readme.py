"""What README.md shows of recipes loads as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from tuner import recipe

ROOT = Path(__file__).resolve().parents[2]
REST = {
    "base": "base: embedded\n",
    "method": "method: {lora: {}}\n",
    "train": "train: {steps: 1, batch_size: 1, learning_rate: 1e-4}\n",
    "output": "output: out\n",
}


def test_its_recipes_load(tmp_path: Path) -> None:
    shown = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(shown) == 2
    for number, text in enumerate(shown):
        missing = [line for key, line in REST.items() if not re.search(rf"^{key}:", text, re.MULTILINE)]
        place = tmp_path / f"shown{number}.yaml"
        place.write_text(text + "".join(missing), encoding="utf-8")
        loaded = recipe.load(place)
        assert loaded.data.source and loaded.method.keys() == {"lora"}
