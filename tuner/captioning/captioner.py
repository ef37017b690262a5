"""Captions by a transformers model: BLIP, BLIP-2, GIT, an encoder with a decoder, or one that chats."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuner import counted
from tuner.captioning.models import LOADING, Model, network, one_line, part
from tuner.data.pictures import Picture

CHAT = "Describe this picture in one sentence."
"""What a model that chats is asked where there is no prompt."""


@dataclass(frozen=True)
class How:
    """How captions are written.

    Attributes:
        prompt: what they go on from (BLIP), or the question (a model that chats).
        beams: of beam search; 1: the likeliest token each time.
        top_p: tokens are drawn from the likeliest that have this probability together (nucleus sampling,
            arXiv 1904.09751; CapFilt's own way, with 0.9); None: nothing is drawn.
        seed: of what is drawn.
        longest, shortest: tokens.
    """

    prompt: str | None = None
    beams: int = 3
    top_p: float | None = None
    seed: int = 0
    longest: int = 40
    shortest: int = 0

    def told(self) -> dict[str, Any]:
        """What a caption depends on, as JSON values."""
        return dataclasses.asdict(self)


class Captioner:
    """Writes captions."""

    def __init__(self, model: Model, how: How, dtype: torch.dtype, device: torch.device) -> None:
        """
        Raises:
            UserError: the model is none for captions, does not load, or takes no prompt.
        """
        import transformers
        from transformers.models.auto import modeling_auto

        known = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        if model.kind not in known:
            raise model.fault(
                f"found a model of type {model.kind}, expected one for captions, such as blip, blip-2, git "
                "or vision-encoder-decoder"
            )
        self.model, self.how, self.dtype, self.device = model, how, dtype, device
        self._network = network(
            model, transformers.AutoModelForImageTextToText, dtype, device, "write captions"
        )
        self._processor: Any = None
        if model.kind == "vision-encoder-decoder":  # there is no processor of both for it
            if how.prompt is not None:
                raise model.fault("--prompt has no effect: this kind of model takes none")
            self._images = part(model, transformers.AutoImageProcessor, backend="pil")
            self._words = part(model, transformers.AutoTokenizer)
        else:
            # Pillow's backend everywhere: torchvision's, where it is installed, resizes a little differently.
            self._processor = part(model, transformers.AutoProcessor, backend="pil")
            self._words = self._processor.tokenizer

    def __call__(self, pictures: Sequence[Picture], names: Sequence[str]) -> list[str]:
        """A caption for each picture, uint8 RGB [H, W, 3]; empty where the model says nothing.

        Args:
            names: of the pictures, by content: what is drawn depends on these, not on the batch.

        Raises:
            UserError: the model does not take these inputs.
        """
        how = self.how
        try:
            inputs, prompt = self._inputs(pictures)
            more = {"min_new_tokens": how.shortest} if how.shortest else {}
            with torch.inference_mode():
                tokens = self._network.generate(
                    **inputs,
                    max_new_tokens=how.longest,
                    num_beams=how.beams,
                    # Drawing is done in the processors, so that it is counted; what is left is a maximum.
                    do_sample=False,
                    logits_processor=self._processors(names),
                    **more,
                )
        except torch.OutOfMemoryError as error:
            raise self.model.fault(
                f"no memory for {len(pictures)} pictures at once; lower --batch"
            ) from error
        except LOADING as error:
            raise self.model.fault(f"does not caption pictures: {one_line(error)}") from error
        texts: list[str] = self._words.batch_decode(tokens, skip_special_tokens=True)
        return [plain(_behind(prompt, text)) for text in texts]

    def _inputs(self, pictures: Sequence[Picture]) -> tuple[dict[str, Any], str]:
        """What the network takes, and the prompt as its tokens read."""
        images = list(pictures)
        if self._processor is None:
            return self._moved(self._images(images=images, return_tensors="pt")), ""
        text = self._prompt()
        if text is None:
            return self._moved(self._processor(images=images, return_tensors="pt")), ""
        inputs = self._processor(images=images, text=[text] * len(images), return_tensors="pt")
        ids: Tensor = inputs["input_ids"]
        if self.model.kind == "git":
            inputs.pop("token_type_ids", None)  # some tokenisers give them, and it takes none
            if bool((ids[:, -1] == self._words.sep_token_id).all()):
                # Its prompt must be open at the end; BLIP's own generate sees to that itself.
                inputs["input_ids"], inputs["attention_mask"] = ids[:, :-1], inputs["attention_mask"][:, :-1]
        return self._moved(inputs), self._words.decode(ids[0], skip_special_tokens=True)

    def _prompt(self) -> str | None:
        if not getattr(self._processor, "chat_template", None):
            return self.how.prompt
        question = {"type": "text", "text": self.how.prompt or CHAT}
        said = [{"role": "user", "content": [{"type": "image"}, question]}]
        template: str = self._processor.apply_chat_template(said, add_generation_prompt=True)
        return template

    def _moved(self, inputs: Any) -> dict[str, Any]:
        moved: dict[str, Any] = {}
        for name, value in inputs.items():
            moved[name] = value.to(self.device)
            if value.is_floating_point():
                moved[name] = moved[name].to(self.dtype)
        return moved

    def _processors(self, names: Sequence[str]) -> Any:
        from transformers import LogitsProcessorList, TopPLogitsWarper

        if self.how.top_p is None:
            return LogitsProcessorList()
        return LogitsProcessorList([TopPLogitsWarper(self.how.top_p), Draw(self.how.seed, names)])


class Draw:
    """Turns taking the likeliest token into drawing one, by a counted random number for each.

    The greatest of logit + Gumbel noise is a draw from the softmax of the logits (the Gumbel-max trick,
    arXiv 1611.00712, section 2). The noise is a function of seed, picture and place in the caption.
    """

    def __init__(self, seed: int, names: Sequence[str]) -> None:
        self.seed, self.names = seed, names
        self.place = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] with noise added."""
        assert len(scores) == len(self.names)
        noise = np.stack([gumbel(scores.shape[1], self.seed, self.place, name) for name in self.names])
        self.place += 1
        return scores.float() + torch.from_numpy(noise).to(scores.device)


def gumbel(count: int, seed: int, place: int, name: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Standard Gumbel noise, float32 [count]: -log(-log(u)) for u evenly in (0, 1)."""
    bits: Any = counted.generator(seed, place, purpose=f"caption {name}").bit_generator
    even = ((bits.random_raw(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    drawn: np.ndarray[tuple[int], np.dtype[np.float32]] = (-np.log(-np.log(even))).astype(np.float32)
    return drawn


def plain(text: str) -> str:
    """A model's text as one line: control, format and private characters are taken out."""
    spaced = " ".join(text.split())
    return " ".join("".join(sign for sign in spaced if unicodedata.category(sign)[0] != "C").split())


def _behind(prompt: str, text: str) -> str:
    """A caption without the prompt that it goes on from."""
    start, whole = prompt.strip(), text.strip()
    return whole[len(start) :] if start and whole.startswith(start) else whole
