"""The inference tools' rules of naming, as data: what each reads of an adapter file, drops or refuses.

Read from, and where they could be had run with, the tools' own code: diffusers 0.42.1, ComfyUI 0.3.64, the
stable-diffusion-webui of the 1.10 era (A1111), stable-diffusion-webui-forge dfdcbab, kohya's sd-scripts
48d368f, sd-webui-controlnet 56cec5b. rules.py applies them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from tuner.export.spelling import BLOCKS, FAMILIES, LAYERS, LORA, PROJECTION, PROJECTIONS, Spelling

Does = Literal["drops", "refuses"]
Words = Literal["reads", "apart", "drops", "refuses"]


class Rules(NamedTuple):
    """How a tool reads adapters (LoRA and kin).

    Attributes:
        keys: a regular expression that every key of the file must match from its beginning, else the tool
            reads the file by its next rules, and refuses it after the last.
        spellings: the names of modules that it knows.
        reads: the dialects and roles that it reads of a module (see spelling.ROLES), as `dialect.role`, or
            `dialect` for all roles of one.
        stranger: what it does at a key of no module that it knows.
        ending: at a key of a module that it knows with an ending that it does not read.
        half: at a module that lacks a factor, by the dialect and first role that is missing; `beside` other
            factors that are complete; `""` for the rest.
        misfit: at factors whose shapes do not fit the module.
        most: how many strange keys it bears before it refuses the file.
        flat: it takes the factors of a convolution of 1x1 as matrices too.
        alphas: `each` module its own, or the `commonest` one of the network where it finds several.
        whole_attention: text encoders in whose attention it uses all of q, k, v and out, or none of them.
        dora: `dora_scale` is read per input channel, or not at all.
        rivals: families where it drops the original code's names if diffusers' stand beside them.
        first: it takes the UNet's keys for peft's if the first of them is, and drops the others then.
        lost: a regular expression of keys that it loses on the way.
        words: what it does with new words that lie in the file (`bundle_emb.NAME.*`): it `reads` them with
            the LoRA; its reader of LoRAs passes them by, but the same file lying `apart`, where words' files
            lie, gives them; it `drops` them as any key of no module; or it `refuses` the file for them.
    """

    keys: str
    spellings: tuple[Spelling, ...]
    reads: frozenset[str]
    stranger: Does = "drops"
    ending: Does = "drops"
    half: Mapping[str, Does] = {"": "drops"}
    misfit: Does = "drops"
    most: int | None = None
    flat: bool = True
    alphas: Literal["each", "commonest"] = "each"
    whole_attention: Mapping[str, str] = {}
    dora: bool = False
    rivals: tuple[str, ...] = ()
    first: bool = False
    lost: str = ""
    words: Words = "drops"


def _text(prefix: str, component: str, families: tuple[str, ...], only: str = PROJECTIONS) -> Spelling:
    """Text encoder names with underscores and `text_model`, as kohya writes them."""
    return Spelling(component, prefix, joined=True, text_model=True, only=only, families=families)


ONE, TWO = ("sd1", "sd2"), ("sdxl",)
UNET = Spelling("unet", "lora_unet_", joined=True)
UNET_ORIGINAL = Spelling("unet", "lora_unet_", joined=True, original=True)
FACTORS = ("kohya.down", "kohya.up", "any.alpha")
LYCORIS = ("kohya.mid", "loha", "lokr", "diff", "norm")
TEXT_2_PROJECTION = Spelling("text_encoder_2", "lora_te2_", joined=True, only=PROJECTION)

DIFFUSERS = (
    Rules(
        keys=r"lora_(unet|te|te1|te2)_",
        spellings=(
            UNET._replace(families=ONE),
            UNET._replace(families=TWO, besides=r"add_embedding\..*"),
            UNET_ORIGINAL._replace(families=TWO),
            UNET_ORIGINAL._replace(families=ONE, only=r"conv_in|conv_out|time_embedding\..*"),
            *(
                Spelling(component, prefix, joined=True, text_model=form, only=PROJECTIONS)
                for component, prefix in (
                    ("text_encoder", "lora_te_"),
                    ("text_encoder", "lora_te1_"),
                    ("text_encoder_2", "lora_te2_"),
                )
                for form in (True, False)
                if form or component == "text_encoder"
            ),
            TEXT_2_PROJECTION,
        ),
        reads=frozenset(FACTORS),
        ending="refuses",
        half={"": "refuses"},
        misfit="refuses",
        flat=False,
        alphas="commonest",
        rivals=TWO,
        words="refuses",  # a file with them is none of kohya's to it, by `keys`
    ),
    Rules(
        keys=r".*lora",
        spellings=(
            Spelling("unet", "unet."),
            Spelling("unet", "unet.", processor=True, only=r".*\.to_.*"),
            Spelling("text_encoder", "text_encoder."),
            Spelling("text_encoder", "text_encoder.", text_model=True, only=PROJECTIONS),
            Spelling("text_encoder_2", "text_encoder_2.", text_model=True),
        ),
        reads=frozenset(
            {"peft", "linear_layer.down", "linear_layer.up"}
            | {f"{dialect}.{role}" for dialect in ("diffusers", "processor") for role in ("down", "up")}
        ),
        half={"": "drops", **dict.fromkeys(("peft.up", "diffusers.up", "processor.up"), "refuses")},
        misfit="refuses",
        flat=False,
        first=True,
        lost=r"text_encoder.*\.lora_magnitude_vector",
        words="refuses",
    ),
)

_COMFY_NAMES = (
    UNET,
    UNET_ORIGINAL,
    Spelling("unet", "lycoris_", joined=True),
    Spelling("unet", "diffusion_model.", original=True),
    Spelling("unet", "unet.", processor=True),
    Spelling("unet", "", processor=True),
    _text("lora_te_", "text_encoder", FAMILIES),
    _text("lora_te1_", "text_encoder", FAMILIES),
    _text("lora_te2_", "text_encoder_2", TWO),
    Spelling("text_encoder", "text_encoder.", text_model=True, only=PROJECTIONS),
    Spelling("text_encoder_2", "text_encoder_2.", text_model=True, only=PROJECTIONS),
    TEXT_2_PROJECTION,
)
COMFYUI = (
    Rules(
        keys="",
        spellings=_COMFY_NAMES,
        reads=frozenset(
            {*FACTORS, *LYCORIS, "peft.down", "peft.up"}
            | {f"{dialect}.{role}" for dialect in ("diffusers", "processor") for role in ("down", "up")}
            | {"linear_layer.down", "linear_layer.up"}
        ),
        # It looks for one factor of each kind, and fails where the others are not there.
        half={
            "": "drops",
            **{f"{dialect}.down": "refuses" for dialect in LORA},
            **{f"loha.{role}": "refuses" for role in ("w1_b", "w2_a", "w2_b")},
        },
        dora=True,
        # comfy/sd1_clip.py, bundled_embed: of a file in models/embeddings; all of its words as one.
        words="apart",
    ),
)
# It has no reader of words in a LoRA's file, unlike A1111 (its issue 345, open).
FORGE = (COMFYUI[0]._replace(most=12, words="drops"),)

A1111 = (
    Rules(
        keys="",
        spellings=(
            UNET._replace(families=ONE, besides="conv_norm_out"),
            # For SDXL it looks for up_blocks.0's upsampler where SD1 has it, and for nothing of the sizes.
            UNET._replace(
                families=TWO, besides=r"up_blocks\.0\.upsamplers\..*|add_embedding\..*|conv_norm_out"
            ),
            UNET_ORIGINAL,
            _text("lora_te_", "text_encoder", ("sd1",), LAYERS),
            _text("lora_te_", "text_encoder", ("sd2",)),
            _text("lora_te1_", "text_encoder", ("sd1", "sdxl"), LAYERS),
            _text("lora_te2_", "text_encoder_2", TWO),
        ),
        reads=frozenset({*FACTORS, *LYCORIS, "peft.down", "peft.up"}),
        half={"": "refuses", "beside": "drops"},
        # OpenCLIP's attention is one module with fused q, k and v.
        whole_attention={"sd2": "text_encoder", "sdxl": "text_encoder_2"},
        dora=True,
        words="reads",  # since 1.7 (its pull request 13568)
    ),
)

KOHYA = (
    Rules(
        keys="",
        spellings=(
            # Only what lies in Transformer2DModel, ResnetBlock2D, Downsample2D and Upsample2D.
            UNET._replace(only=BLOCKS),
            UNET_ORIGINAL._replace(only=BLOCKS, families=TWO),
            _text("lora_te_", "text_encoder", ONE),
            _text("lora_te1_", "text_encoder", TWO),
            _text("lora_te2_", "text_encoder_2", TWO),
        ),
        reads=frozenset(FACTORS),
        half={"": "drops"},
        misfit="refuses",
        flat=False,
    ),
)

ADAPTERS: Mapping[str, tuple[Rules, ...]] = {
    "diffusers": DIFFUSERS,
    "ComfyUI": COMFYUI,
    "A1111": A1111,
    "Forge": FORGE,
    "kohya": KOHYA,
}


class Label(NamedTuple):
    """Metadata by which a web UI shows a LoRA as one of a family.

    Attributes:
        key: of the header; None for any metadata at all.
        value: what it says.
        family: what the file is shown as then.
        starts: it is enough that the header's value starts with `value`.
    """

    key: str | None
    value: str
    family: str
    starts: bool = False


# The first that fits; where none does, the file is shown as unknown. In both of them: network.py,
# NetworkOnDisk.detect_version, of the extension for LoRAs. A1111 leaves out of its list what is shown as of
# another family than the loaded base's (ui_extra_networks_lora.py), unless `lora_show_all` is set.
_SDXL, _SD2 = Label("ss_base_model_version", "sdxl_", "sdxl", starts=True), Label("ss_v2", "True", "sd2")
LABELS: Mapping[str, tuple[Label, ...]] = {
    "A1111": (_SDXL, _SD2, Label(None, "", "sd1")),
    "Forge": (
        Label("modelspec.architecture", "stable-diffusion-xl-v1-base/lora", "sdxl"),
        _SDXL,
        _SD2,
        Label("modelspec.architecture", "stable-diffusion-v1/lora", "sd1"),
    ),
}


class Table(NamedTuple):
    """How a tool reads the vectors of new words (Textual Inversion).

    Attributes:
        strangers: what it does where a file for one text encoder has several tensors.
        half: where a file for two text encoders has the vectors of one alone.
        narrow: where the vectors are not as wide as the text encoder's.
        lists: one tensor [D] in place of [1, D] is taken.
        trigger: what the word is in prompts.
        named: the key that it looks for, by family, before it takes the first tensor.
    """

    strangers: Does
    half: Does
    narrow: Does
    lists: bool
    trigger: Literal["key", "file"]
    named: Mapping[str, str] = {}


# ComfyUI: comfy/sd1_clip.py, load_embed, by its encoders' `embedding_key`. kohya's gen_img.py (and --weights
# of its train_textual_inversion.py) takes the first tensor whatever it is called, as [n, D]; for SDXL clip_l
# and clip_g. `emb_params` is what that trainer writes; nothing looks for the name.
EMBEDDINGS: Mapping[str, Table] = {
    "diffusers": Table("refuses", "drops", "refuses", lists=True, trigger="key"),
    "ComfyUI": Table(
        "drops", "drops", "refuses", lists=True, trigger="file", named={"sd1": "clip_l", "sd2": "clip_h"}
    ),
    "A1111": Table("refuses", "refuses", "refuses", lists=True, trigger="file"),
    "Forge": Table("refuses", "refuses", "refuses", lists=True, trigger="file"),
    "kohya": Table("drops", "refuses", "refuses", lists=False, trigger="file"),
}


class Control(NamedTuple):
    """How a tool reads a ControlNet.

    Attributes:
        sizes: in which layouts it takes only the published sizes (320 channels and so on).
        refuses: layout -> families that it cannot read in it.
        heads: in the original layout it makes attention heads 64 wide where the base is not SD 1.5's size.
        eight: it gives every SD2 net 8 heads, whatever their width; no file can mend that.
        pools: what in a file's name (without its ending) turns on the pooling meant for `shuffle`.
        pooled: families of which it pools.
        faces: what in a file's name makes it read faces in place of prompts.
        lacking: what it does where a tensor is missing.
    """

    sizes: frozenset[str]
    refuses: Mapping[str, tuple[str, ...]] = {}
    heads: bool = False
    eight: bool = False
    pools: str = ""
    pooled: tuple[str, ...] = FAMILIES
    faces: str = ""
    lacking: Does = "drops"


CONTROLNETS: Mapping[str, Control] = {
    "diffusers": Control(frozenset(), refuses={"cldm": TWO}, lacking="refuses"),
    "ComfyUI": Control(frozenset({"diffusers"}), heads=True, pools=r".*_shuffle(_fp16)?"),
    "Forge": Control(frozenset({"diffusers"}), heads=True, pools=r".*_shuffle(_fp16)?"),
    # scripts/controlnet_model_guess.py, build_model_by_guess: by the file's name; instant_id by its path too.
    "sd-webui-controlnet": Control(
        frozenset({"diffusers", "cldm"}),
        eight=True,
        pools=r".*(?i:shuffle).*",
        pooled=ONE,
        faces=r".*(?i:instant_id).*",
    ),
}


class Whole(NamedTuple):
    """Which sizes of a checkpoint in the original layout a tool recognises: any, or these alone."""

    sizes: Literal["any", "published", "detected"]


CHECKPOINTS: Mapping[str, Whole] = {
    "diffusers": Whole("any"),  # from_single_file with `config=` a folder of the same size
    "ComfyUI": Whole("detected"),
    "A1111": Whole("published"),
    "Forge": Whole("detected"),
    "kohya": Whole("published"),
}
