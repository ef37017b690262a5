"""Captions become what the diffusers pipelines make of them; layers, windows and pooling are chosen right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tuner import base, text
from tuner.data.cache import Hashes
from tuner.errors import UserError
from tuner.family import Options

PROMPTS = ("a red toy by the sea", "", "!toy! " * 30)  # the last one is longer than a window
NEEDS = ("unet", "vae", "text_encoder")


@pytest.fixture
def load(folders: dict[str, Path], tmp_path: Path) -> Any:
    """A fresh tiny base by name, with options."""

    def fresh(name: str, **options: Any) -> Any:
        return base.load(str(folders[name]), None, (), NEEDS, 0, Hashes(tmp_path), Options(**options))

    return fresh


def by_pipeline(family: Any, **more: Any) -> tuple[Tensor, Tensor | None]:
    """The hidden states and the pooled output that the family's pipeline makes of PROMPTS."""
    arguments = {"device": family.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    found = family.pipeline().encode_prompt(list(PROMPTS), **arguments, **more)
    return found[0], found[2] if len(found) == 4 else None


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_captions_are_encoded_as_by_the_pipeline(load: Any, name: str) -> None:
    family = load(name)
    with torch.no_grad():
        hidden, pooled = by_pipeline(family)
        found = family.encode_prompts(family.tokenize(PROMPTS))
    assert torch.equal(found.hidden, hidden)
    assert (found.pooled is None) == (pooled is None) == (name != "sdxl")
    if pooled is not None:
        assert torch.equal(found.pooled, pooled)
    assert not torch.equal(hidden[0], hidden[1]) and hidden.shape[:2] == (3, 77)


@pytest.mark.parametrize("skip", [2, 3])
def test_sdxls_clip_skip_is_the_pipelines_but_counts_from_the_last_layer(load: Any, skip: int) -> None:
    family, plain = load("sdxl", clip_skip=skip), load("sdxl")
    with torch.no_grad():
        hidden, pooled = by_pipeline(plain, clip_skip=skip - 2)
        found = family.encode_prompts(family.tokenize(PROMPTS))
        default = plain.encode_prompts(plain.tokenize(PROMPTS))
    assert torch.equal(found.hidden, hidden) and torch.equal(found.pooled, pooled)
    assert torch.equal(found.hidden, default.hidden) == (skip == 2)
    assert torch.equal(found.pooled, default.pooled)


@pytest.mark.parametrize(
    ("name", "skip", "layer"), [("sd1", 1, 2), ("sd1", 2, 1), ("sd2", 2, 3), ("sd2", 4, 1)]
)
def test_clip_skip_reads_a_layer_through_the_final_normalisation(
    load: Any, name: str, skip: int, layer: int
) -> None:
    """`layer` counts from the first; SD 2's folder lacks the one that clip skip 1 would be."""
    family = load(name, clip_skip=skip)
    encoder, tokens = family.networks["text_encoder"], family.tokenize(PROMPTS)
    with torch.no_grad():
        # The layers one by one; the mask lets each position see what is before it.
        state = encoder.embeddings(input_ids=tokens.ids[:, 0])
        mask = torch.full((77, 77), -torch.inf).triu(1)[None, None]
        for one in encoder.encoder.layers[:layer]:
            state = one(state, mask)
        expected = encoder.final_layer_norm(state)
        found = family.encode_prompts(tokens).hidden
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "skip", "allowed"),
    [("sd1", 3, "1 to 2"), ("sd2", 1, "2 to 4"), ("sd2", 5, "2 to 4"), ("sdxl", 4, "1 to 3")],
)
def test_a_layer_that_is_not_there_is_an_error(load: Any, name: str, skip: int, allowed: str) -> None:
    with pytest.raises(UserError, match=rf"base\.clip_skip: found {skip}, expected {allowed}"):
        load(name, clip_skip=skip)


@pytest.mark.parametrize(
    ("name", "skip"), [("sd1", 1), ("sd1", 2), ("sd2", 2), ("sd2", 3), ("sdxl", 2), ("sdxl", 3)]
)
def test_what_is_not_read_gets_no_gradient_and_all_else_does(load: Any, name: str, skip: int) -> None:
    family = load(name, clip_skip=skip)
    for encoder in family.text_encoders.values():
        encoder.requires_grad_(True)
    found = family.encode_prompts(family.tokenize(PROMPTS))
    (found.hidden.square().sum() + (0 if found.pooled is None else found.pooled.square().sum())).backward()
    lost = {"sd1": skip - 1, "sd2": skip - 2, "sdxl": skip - 1}[name]
    for encoder, network in family.text_encoders.items():
        unread = family.unread(encoder)
        assert len(unread) == (0 if encoder == "text_encoder_2" else lost)
        within = tuple(f"{path}." for path in unread)
        reached = {n: p.grad is not None and bool(p.grad.any()) for n, p in network.named_parameters()}
        # A key's bias adds the same to all scores of a query. SDXL's first encoder is not normalised.
        silent = {n for n, seen in reached.items() if not seen and not n.endswith("k_proj.bias")}
        unused = {n for n in reached if n.startswith(within)} if within else set()
        end = {n for n in reached if n.startswith("final_layer_norm") and name == "sdxl"}
        assert silent - end == {n for n in unused if not n.endswith("k_proj.bias")}


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("windows", [2, 3])
def test_windows_are_encoded_one_by_one(load: Any, name: str, windows: int) -> None:
    """Each window is what the pipeline makes of its part of the caption alone."""
    long = "t " * 100  # a letter is a token
    family, plain = load(name, windows=windows), load(name)
    tokens = family.tokenize(["a red toy", long])
    parts = [["a red toy", "", ""][:windows], ["t " * 75, "t " * 25, ""][:windows]]
    for mine, single in zip(tokens.each(), plain.tokenize(sum(parts, [])).each(), strict=True):
        assert mine.ids.shape == (2, windows, 77) and mine.ends.shape == (2, windows)
        assert torch.equal(mine.ids, single.ids.reshape(2, windows, 77))
        assert torch.equal(mine.ends, single.ends.reshape(2, windows))
        assert mine.ends[1].tolist() == [76, 26, 1][:windows]
        assert mine.cut == (0, 0)
    with torch.no_grad():
        found = family.encode_prompts(tokens)
        single = plain.encode_prompts(plain.tokenize(sum(parts, [])))
    assert torch.equal(found.hidden, single.hidden.reshape(2, windows * 77, -1))
    if found.pooled is not None:
        # Not bitwise: the projection of another number of captions at once adds up in another order.
        expected = single.pooled.reshape(2, windows, -1)[:, 0]
        torch.testing.assert_close(found.pooled, expected, rtol=1e-5, atol=1e-6)
        assert windows == 1 or not torch.allclose(found.pooled, single.pooled.reshape(2, windows, -1)[:, 1])


def test_what_does_not_fit_is_counted(load: Any) -> None:
    captions = ["t " * count for count in (0, 74, 75, 76, 150, 151, 400)]
    for windows, cut in ((1, (0, 0, 0, 1, 75, 76, 325)), (2, (0, 0, 0, 0, 0, 1, 250))):
        tokens = load("sdxl", windows=windows).tokenize(captions)
        assert [one.cut for one in tokens.each()] == [cut, cut]


def test_the_pooled_output_is_at_the_end_of_text_also_behind_new_tokens(load: Any) -> None:
    family, plain = load("sdxl"), load("sdxl")
    assert family.networks["text_encoder_2"].config.eos_token_id == 2
    ids = family.add_tokens(["<new>"])
    assert ids == {"text_encoder": [518], "text_encoder_2": [518]}
    rows = {}
    for encoder in family.text_encoders:
        (red,) = plain.tokenizers[encoder]("red", add_special_tokens=False).input_ids
        rows[encoder] = family.embedding(encoder).weight[[red]].clone()
    with torch.no_grad():
        found = family.encode_prompts(family.tokenize(["a <new> by the sea"]), rows)
        expected = plain.encode_prompts(plain.tokenize(["a red by the sea"]))
        encoder, tokens = family.networks["text_encoder_2"], family.tokenize(["a <new> by the sea"]).second
        with text.extra_rows(family.embedding("text_encoder_2"), rows["text_encoder_2"]):
            elsewhere = encoder(tokens.ids[:, 0]).text_embeds  # at the highest id, which is the new token
    assert torch.equal(found.hidden, expected.hidden) and torch.equal(found.pooled, expected.pooled)
    assert not torch.allclose(elsewhere, expected.pooled, atol=1e-3)


def test_rows_of_each_encoder_get_their_gradient(load: Any) -> None:
    family = load("sdxl")
    family.add_tokens(["<new>", "<new>_1"])
    rows = {
        n: torch.randn(2, family.embedding(n).embedding_dim, requires_grad=True) for n in family.text_encoders
    }
    family.encode_prompts(family.tokenize(["a <new>", "no new word"]), rows).hidden.sum().backward()
    assert {name: one.shape[1] for name, one in rows.items()} == {"text_encoder": 32, "text_encoder_2": 64}
    for one in rows.values():
        assert one.grad is not None and bool(one.grad[0].any()) and not bool(one.grad[1].any())


def test_a_token_that_is_there_already_is_refused_before_any_is_added(load: Any) -> None:
    family = load("sdxl")
    with pytest.raises(UserError, match=r"the token toy</w> is in the base's vocabulary already"):
        family.add_tokens(["<new>", "toy</w>"])
    assert {len(tokenizer) for tokenizer in family.tokenizers.values()} == {518}


def test_tokens_and_texts_are_changed_whole() -> None:
    one = torch.zeros(2, 1, 77, dtype=torch.int64)
    tokens = text.Tokens(one, one[..., 0], (0, 3), text.Tokens(one + 1, one[..., 0] + 1, (0, 4)))
    changed = tokens.map(lambda tensor: tensor + 5)
    assert [int(each.ids.max()) for each in changed.each()] == [5, 6]
    assert [int(each.ends.max()) for each in changed.each()] == [5, 6]
    assert [each.cut for each in changed.each()] == [(0, 3), (0, 4)]
    moved = tokens.to(torch.device("meta"))
    assert {t.device.type for each in moved.each() for t in (each.ids, each.ends)} == {"meta"}
    encoded = text.Text(torch.ones(1, 77, 4), torch.ones(1, 3)).map(lambda tensor: 2 * tensor)
    assert encoded.pooled is not None and float(encoded.hidden.sum() + encoded.pooled.sum()) == 2 * (
        77 * 4 + 3
    )
