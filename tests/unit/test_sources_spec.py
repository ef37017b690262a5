"""The recipe's block for a source."""

from __future__ import annotations

import pydantic
import pytest

from tuner.data.sources.spec import SourceSpec


@pytest.mark.parametrize(
    "path, kind",
    [
        ("pictures", "folder"),
        ("hub:owner/name", "hub"),
        ("hub:name", "hub"),
        ("data/*.parquet", "table"),
        ("one.arrow", "table"),
        ("shards/*.tar", "tars"),
        ("a.tar.gz", "tars"),
        ("https://host/{000..009}.tar", "urls"),
    ],
)
def test_the_path_says_what_it_is(path: str, kind: str) -> None:
    assert SourceSpec(path=path).kind == kind == SourceSpec.model_validate(path).kind


@pytest.mark.parametrize(
    "given, told",
    [
        ({"path": "a", "revision": "x"}, "revision: has no effect: path is a folder of pictures"),
        ({"path": "hub:a/b", "captions_from": "name"}, "captions_from: has no effect: path is a set on the"),
        ({"path": "a.tar", "columns": {"picture": "x"}}, "columns: has no effect: path is local tars"),
        ({"path": "hub:a/b", "buffer": 5}, "buffer: has no effect: the set is not streamed"),
        ({"path": "a", "captions_from": "name", "columns": {}}, "columns: has no effect: captions_from is"),
        ({"path": "hub:a/b/c"}, "found 'hub:a/b/c', expected hub:owner/name"),
        ({"path": "a", "mask_from": "m/", "condition_from": "m/"}, "both are m/, expected two places"),
        ({"path": "a", "trust_remote_code": True}, "Extra inputs"),
    ],
)
def test_keys_that_do_not_go_together(given: dict[str, object], told: str) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        SourceSpec.model_validate(given)
    assert told in str(caught.value)


def test_a_resolved_block_loads_again() -> None:
    given = SourceSpec(path="hub:a/b", columns={"caption": "prompt"}, streaming=True)  # type: ignore[arg-type]
    written = given.resolved()
    assert "captions_from" not in written and written["columns"]["caption"] == "prompt"
    assert SourceSpec.model_validate(written) == given
