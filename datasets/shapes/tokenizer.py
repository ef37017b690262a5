"""Makes the embedded base's CLIP tokeniser from the captions of a split.

    python datasets/shapes/tokenizer.py datasets/shapes/base tuner/embedded

Byte-pair merges are learned from the captions; all 256 bytes are in the alphabet, alone and at a word's end,
so that any prompt can be written. Also writes text_encoder/config.json, whose vocabulary has that size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 512
TEXT_ENCODER = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "max_position_embeddings": 77,
    "projection_dim": 256,
    "hidden_act": "quick_gelu",
}


def learn(captions: list[str]) -> list[tuple[str, str]]:
    """The merges of the captions, most frequent first."""
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Whitespace(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=512 + MERGES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        min_frequency=20,
        show_progress=False,
    )
    model.train_from_iterator(captions, trainer)
    return [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]][:MERGES]


def main() -> None:
    """Read the captions, write tokenizer/ and text_encoder/config.json."""
    split, base = Path(sys.argv[1]), Path(sys.argv[2])
    lines = (split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    captions = sorted({caption for line in lines for caption in json.loads(line)["text"]})
    merges = learn(captions)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [
        *symbols,
        *(s + "</w>" for s in symbols),
        *dict.fromkeys("".join(pair) for pair in merges),
        START,
        END,
    ]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(base / "tokenizer")
    # The two files of the older layout as well, which other tools read.
    (base / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (base / "tokenizer" / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    )
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
        **TEXT_ENCODER,
    ).to_dict()
    config |= {"architectures": ["CLIPTextModel"], "dtype": "float32"}
    config.pop("transformers_version", None)
    (base / "text_encoder").mkdir(exist_ok=True)
    (base / "text_encoder" / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    print(f"{len(captions)} captions, {len(merges)} merges, {len(vocabulary)} tokens")


if __name__ == "__main__":
    main()
