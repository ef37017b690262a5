"""Which base the web UIs list a LoRA's file for, by its metadata and their tables in tools.py."""

from __future__ import annotations

from collections.abc import Mapping

from tuner.export.tools import LABELS

NAMES = {"sd1": "SD 1", "sd2": "SD 2", "sdxl": "SDXL"}


def shown(tool: str, metadata: Mapping[str, str]) -> tuple[str | None, str]:
    """The family that a tool's list shows a file as, None for an unknown one; and the key that says so.

    Raises:
        KeyError: a tool that shows none.
    """
    for label in LABELS[tool]:
        if label.key is None and metadata:
            return label.family, ""
        if label.key is not None and label.starts and metadata.get(label.key, "").startswith(label.value):
            return label.family, label.key
        if label.key is not None and metadata.get(label.key) == label.value:
            return label.family, label.key
    return None, ""


def caution(tool: str, metadata: Mapping[str, str], family: str) -> str:
    """What a user of a base of this family should know of a file's label; empty where it is the right one.

    No weight is read otherwise for it: an unfit label hides a file, or misleads who looks for one.
    """
    if tool not in LABELS:
        return ""
    found, key = shown(tool, metadata)
    if found == family:
        return ""
    if found is None:
        return f"no metadata says which base it is for: its list shows it as Unknown, not as {NAMES[family]}"
    why = f"{key} is {metadata[key]}" if key else "metadata that does not say otherwise means that to it"
    hides = f", and hides it beside a base of {NAMES[family]}" if tool == "A1111" else ""
    return f"its list shows it as {NAMES[found]}{hides}: {why}"
