"""How well a caption matches a picture: by BLIP's or BLIP-2's matching head, or the cosine of a CLIP pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tuner import components
from tuner.captioning.models import LOADING, Model, network, one_line, part
from tuner.data.pictures import Picture, to_signed
from tuner.data.transform import Transform
from tuner.text import pool, tokenize


class Scores(NamedTuple):
    """Of captions: how well each matches, and how many of its tokens the model could not read."""

    values: list[float]
    cut: list[int]


class Filter(ABC):
    """Scores captions, in float32.

    Attributes:
        measure: what a score is.
        usual: the threshold where none is given; None: there is no usual one.
    """

    measure: str
    usual: float | None = None

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model, self.device = model, device
        self.load()

    @abstractmethod
    def load(self) -> None:
        """Load networks, tokeniser and image processor."""

    @abstractmethod
    def score(
        self, pictures: Sequence[Picture], texts: Sequence[str], of: Tensor
    ) -> tuple[Tensor, list[int]]:
        """Scores [T], and the tokens that were cut off each text; `of` [T]: the picture's number."""

    def __call__(self, pictures: Sequence[Picture], texts: Sequence[str], of: Sequence[int]) -> Scores:
        """The scores of texts, each with the picture of this number.

        Args:
            pictures: uint8 RGB [H, W, 3].

        Raises:
            UserError: the model does not take these inputs, or its answer is no number.
        """
        try:
            with torch.inference_mode():
                values, cut = self.score(pictures, texts, torch.tensor(of, device=self.device))
        except torch.OutOfMemoryError as error:
            raise self.model.fault(
                f"no memory for {len(pictures)} pictures at once; lower --batch"
            ) from error
        except LOADING as error:
            raise self.model.fault(f"does not score captions: {one_line(error)}") from error
        if not bool(torch.isfinite(values).all()):
            raise self.model.fault(
                f"its score is no number for {texts[int((~torch.isfinite(values)).nonzero()[0])]!r}"
            )
        return Scores(values.float().tolist(), cut)

    def processors(self) -> tuple[Any, Any]:
        """The model's image processor and tokeniser."""
        import transformers

        images = part(self.model, transformers.AutoImageProcessor, backend="pil")
        return images, part(self.model, transformers.AutoTokenizer)

    def pixels(self, pictures: Sequence[Picture]) -> Tensor:
        """What the model's own processor makes of pictures, [B, 3, H, W]."""
        made: Tensor = self.images(images=list(pictures), return_tensors="pt")["pixel_values"]
        return made.to(self.device)

    def words(self, texts: Sequence[str], most: int) -> tuple[Tensor, Tensor, list[int]]:
        """Token ids [T, L] and attention mask [T, L], cut to `most` tokens; how many were cut off each."""
        most = min(most, int(self.tokenizer.model_max_length))
        whole = self.tokenizer(list(texts), verbose=False)["input_ids"]
        cut = [max(0, len(ids) - most) for ids in whole]
        read = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt"
        ).to(self.device)
        return read["input_ids"], read["attention_mask"], cut

    images: Any
    tokenizer: Any


class Matching(Filter):
    """The probability that a text matches, by the matching (ITM) head of a model of `kind`."""

    measure = "ITM probability"
    usual = 0.5  # CapFilt takes out what the head calls unmatched
    kind: str

    def load(self) -> None:
        """The model, by the name of its class in transformers."""
        import transformers

        kind = getattr(transformers, self.kind)
        self.network = network(self.model, kind, torch.float32, self.device, "match captions (ITM)")
        self.images, self.tokenizer = self.processors()


class BlipMatching(Matching):
    """By BLIP's head (arXiv 2201.12086, section 3.2)."""

    kind = "BlipForImageTextRetrieval"

    def score(
        self, pictures: Sequence[Picture], texts: Sequence[str], of: Tensor
    ) -> tuple[Tensor, list[int]]:
        """Each picture is encoded once, whatever the number of its texts."""
        net = self.network
        ids, mask, cut = self.words(texts, net.config.text_config.max_position_embeddings)
        seen = net.vision_model(pixel_values=self.pixels(pictures)).last_hidden_state[of]
        whole = torch.ones(seen.shape[:-1], dtype=torch.long, device=self.device)
        read = net.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=whole
        )
        return net.itm_head(read.last_hidden_state[:, 0]).softmax(dim=-1)[:, 1], cut


class Blip2Matching(Matching):
    """By BLIP-2's head (arXiv 2301.12597, section 3.2)."""

    kind = "Blip2ForImageTextRetrieval"

    def score(
        self, pictures: Sequence[Picture], texts: Sequence[str], of: Tensor
    ) -> tuple[Tensor, list[int]]:
        """The mean over the queries' logits, as transformers' own forward pass has it."""
        net = self.network
        ids, mask, cut = self.words(texts, net.config.qformer_config.max_position_embeddings)
        seen = net.vision_model(pixel_values=self.pixels(pictures)).last_hidden_state[of]
        queries = net.query_tokens.expand(len(ids), -1, -1)
        asked = torch.ones(queries.shape[:-1], dtype=torch.long, device=self.device)
        read = net.qformer(
            query_embeds=net.embeddings(input_ids=ids, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=torch.cat([asked, mask], dim=1),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=self.device),
        )
        logits = net.itm_head(read.last_hidden_state[:, : queries.shape[1]]).mean(dim=1)
        return logits.softmax(dim=-1)[:, 1], cut


class ClipSimilarity(Filter):
    """The cosine of CLIP's two embeddings (arXiv 2103.00020), -1 to 1."""

    measure = "CLIP similarity"

    def load(self) -> None:
        """CLIPModel."""
        import transformers

        self.network = network(
            self.model, transformers.CLIPModel, torch.float32, self.device, "compare pictures with captions"
        )
        self.images, self.tokenizer = self.processors()

    def score(
        self, pictures: Sequence[Picture], texts: Sequence[str], of: Tensor
    ) -> tuple[Tensor, list[int]]:
        """Each picture is encoded once, whatever the number of its texts."""
        ids, mask, cut = self.words(texts, self.network.config.text_config.max_position_embeddings)
        told = self.network(input_ids=ids, attention_mask=mask, pixel_values=self.pixels(pictures))
        return _cosine(told.text_embeds, told.image_embeds[of]), cut


class PairSimilarity(Filter):
    """The cosine of a base's text encoder and its image encoder, such as the embedded base has."""

    measure = "CLIP similarity"

    def load(self) -> None:
        """The two encoders of method contrastive, and the base's tokeniser."""
        import transformers

        folder = self.model.folder
        loaded: Any = [components.load(name, folder / name) for name in ("text_encoder", "image_encoder")]
        self.text, self.image = (one.eval().requires_grad_(False).to(self.device) for one in loaded)
        try:
            self.tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
        except LOADING as error:
            raise self.model.fault(f"its tokenizer does not load: {one_line(error)}") from error
        wide, deep = self.text.config.hidden_size, self.image.config.projection_dim
        if wide != deep:
            raise self.model.fault(
                f"its text encoder is {wide} wide, its image encoder's projection {deep}: they were not "
                "trained together"
            )

    def score(
        self, pictures: Sequence[Picture], texts: Sequence[str], of: Tensor
    ) -> tuple[Tensor, list[int]]:
        """The text is read at its end token, without a projection; of pictures the middle square is seen."""
        tokens = tokenize(self.tokenizer, texts)
        ids, ends = tokens.ids[:, 0].to(self.device), tokens.ends[:, 0].to(self.device)
        side = int(self.image.config.image_size)
        square = np.stack([to_signed(Transform(side, side)(picture)) for picture in pictures])
        seen = self.image(torch.from_numpy(square).to(self.device)).image_embeds
        return _cosine(pool(self.text(ids).last_hidden_state, ends), seen[of]), list(tokens.cut)


KINDS: dict[str, type[Filter]] = {
    "blip": BlipMatching,
    "blip-2": Blip2Matching,
    "clip": ClipSimilarity,
    "pair": PairSimilarity,
}


def filter_of(model: Model) -> type[Filter]:
    """The kind of filter that a model is.

    Raises:
        UserError: it is none.
    """
    if model.kind not in KINDS:
        raise model.fault(
            f"found a model of type {model.kind}, expected blip or blip-2 with an ITM head, clip, "
            "or a base's folder with image_encoder and text_encoder"
        )
    return KINDS[model.kind]


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return functional.cosine_similarity(one.float(), other.float(), dim=-1)
