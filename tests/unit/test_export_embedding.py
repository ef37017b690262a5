from __future__ import annotations

import pytest
import torch

from tuner.export import embedding


def test_one_tensor_named_by_the_token() -> None:
    vectors = torch.randn(3, 8, requires_grad=True)
    tensors = embedding.to_file("<toy>", vectors)
    assert list(tensors) == ["<toy>"]
    assert torch.equal(tensors["<toy>"], vectors) and not tensors["<toy>"].requires_grad


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 2, 8)])
def test_vectors_must_be_a_table(shape: tuple[int, ...]) -> None:
    with pytest.raises(embedding.TokenError, match="expected"):
        embedding.to_file("<toy>", torch.zeros(shape))


def test_an_empty_token_is_refused() -> None:
    with pytest.raises(embedding.TokenError, match="empty"):
        embedding.to_file(" ", torch.zeros(1, 8))


@pytest.mark.parametrize(
    ("token", "name"),
    [
        ("<toy>", "toy"),
        ("toy", "toy"),
        ("<cat-toy>", "cat-toy"),
        ("my_v1.5", "my_v1.5"),
        ("<größe>", "größe"),
    ],
)
def test_the_file_is_named_by_the_token_without_brackets(token: str, name: str) -> None:
    assert embedding.file_name(token) == f"{name}.safetensors"


@pytest.mark.parametrize(
    "token",
    ["", "<>", "a/b", "<../toy>", "a\\b", "..", ".hidden", "two words", "*", "<<toy>>", "c:x", "toy."]
    + ["a\0b", "x\n", "x" * 300],
)
def test_names_that_are_no_plain_word_are_refused(token: str) -> None:
    with pytest.raises(embedding.TokenError, match="cannot name a file"):
        embedding.file_name(token)
