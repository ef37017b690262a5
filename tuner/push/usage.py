"""How each inference tool loads what a run exported: folders, words in prompts, and code for diffusers.

Where a tool looks for files is from its own documentation; what it reads is in tuner/export/tools.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tuner.errors import UserError
from tuner.export import contents
from tuner.export.contents import Contents
from tuner.export.identify import Identity, identify
from tuner.export.rules import bundled
from tuner.files import account, bases

STEP = re.compile(r"step-(\d+)")  # the folder of a step's exports, and the stem of its previews
LORA = "LoRA"
BUNDLE = "LoRA with words"
TOOLS = ("diffusers", "ComfyUI", "A1111", "Forge", "kohya sd-scripts")
_PLACES: Mapping[str, Mapping[str, str]] = {  # the kind of a file -> tool -> folder or option
    "adapter": {"ComfyUI": "models/loras/", "A1111": "models/Lora/", "Forge": "models/Lora/"},
    "embedding": {
        "ComfyUI": "models/embeddings/",
        "A1111": "embeddings/",
        "Forge": "embeddings/",
        "kohya sd-scripts": "--textual_inversion_embeddings",
    },
    "ControlNet": {
        "ComfyUI": "models/controlnet/",
        "A1111": "models/ControlNet/ (with the extension sd-webui-controlnet)",
        "Forge": "models/ControlNet/",
    },
    "Control-LoRA": {"ComfyUI": "models/controlnet/", "Forge": "models/ControlNet/"},
    "checkpoint": {
        "ComfyUI": "models/checkpoints/",
        "A1111": "models/Stable-diffusion/",
        "Forge": "models/Stable-diffusion/",
        "kohya sd-scripts": "--ckpt",
    },
}
_BY_RULES = {"kohya": "kohya sd-scripts", "sd-webui-controlnet": "A1111"}  # as the rules call a tool -> TOOLS
_KOHYA_LORA = {"kohya sd-scripts": "--network_module networks.lora --network_weights"}
_ARGUMENTS = {  # the class of a network's folder -> the pipeline's argument that takes it, and its library
    "UNet2DConditionModel": ("unet", "diffusers"),
    "AutoencoderKL": ("vae", "diffusers"),
    "CLIPTextModel": ("text_encoder", "transformers"),
    "CLIPTextModelWithProjection": ("text_encoder_2", "transformers"),
    "ControlNetModel": ("controlnet", "diffusers"),
}
_PIPELINES = {"sd1": "StableDiffusion", "sd2": "StableDiffusion", "sdxl": "StableDiffusionXL"}
_OWN_LAYER = {"sd1": 1, "sd2": 2, "sdxl": 2}  # what clip skip is where a recipe leaves it to the family


class Part(NamedTuple):
    """A file, or a folder in diffusers layout, of an export.

    Attributes:
        path: below the export's folder.
        kind: as identify.Identity has it; for a folder the class of the network, or `pipeline`.
        layout: as there; `folder` for a folder.
        family: sd1, sd2, sdxl or None.
        tokens: the words that a file of vectors holds.
        about: what else is worth saying, such as ranks.
        words: those that lie in a LoRA's file; see rules.Rules.words.
        loaders: the tools whose rules load all of the file; None where its base is not known here, or the
            rules do not tell: then its kind alone says where it goes.
    """

    path: str
    kind: str
    layout: str
    family: str | None
    tokens: tuple[str, ...] = ()
    about: str = ""
    words: tuple[str, ...] = ()
    loaders: tuple[str, ...] | None = None

    @property
    def stem(self) -> str:
        return Path(self.path).stem

    @property
    def places(self) -> dict[str, str]:
        """Tool -> where the file goes; only tools that load all of it, diffusers left out."""
        found = self._of_kind()
        if self.loaders is None:
            return found
        return {tool: place for tool, place in found.items() if tool in self.loaders}

    def _of_kind(self) -> dict[str, str]:
        """The same for any file of this kind."""
        if self.kind == LORA:
            return {**_PLACES["adapter"], **_KOHYA_LORA} if self.layout.startswith("kohya") else {}
        if self.kind == BUNDLE:  # ComfyUI reads the words of a file as one, where files of words lie
            both = {"ComfyUI": "models/loras/ and models/embeddings/"} if len(self.words) == 1 else {}
            return {**both, "A1111": _PLACES["adapter"]["A1111"]}
        if self.kind in ("LoHa", "LoKr", "full differences"):
            return dict(_PLACES["adapter"])
        if self.kind == "ControlNet" and self.layout != "cldm":
            return {}
        if self.kind == "embedding" and self.layout == "several tensors":
            return {}
        return dict(_PLACES.get(self.kind, {}))


def files(folder: Path) -> list[Path]:
    """The files of an export, sorted; those of single steps on the way are left out."""
    every = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in every if not STEP.fullmatch(path.relative_to(folder).parts[0])]


def parts(folder: Path, base: str | None = None) -> list[Part]:
    """What an export's files and folders are, sorted by path.

    Args:
        base: the base's name or place, as a recipe has it; where it is not here, the shipped base of the
            same sizes is asked for.

    Raises:
        UserError: a safetensors file that cannot be read.
    """
    every = files(folder)
    marks = {path.parent for path in every if path.name in ("model_index.json", "config.json")}
    whole = sorted(
        place for place in marks if place != folder and not marks & (set(place.parents) - {folder})
    )
    found = [_folder(place, folder) for place in whole]
    for path in every:
        if path.suffix == ".safetensors" and not set(whole) & set(path.parents):
            found.append(_file(path, folder, base))
    return sorted(found)


def _folder(place: Path, root: Path) -> Part:
    name = place.relative_to(root).as_posix()
    weights = sorted(place.rglob("*.safetensors"))
    families = [identify(contents.read(path)).family for path in weights]
    family = next((one for one in families if one is not None), None)
    if (place / "model_index.json").is_file():
        return Part(name, "pipeline", "folder", family)
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    kind = config.get("_class_name") or next(iter(config.get("architectures") or ["network"]))
    return Part(name, str(kind), "folder", family)


def _file(path: Path, root: Path, base: str | None) -> Part:
    read = contents.read(path)
    found = identify(read)
    about = ", ".join(f"rank {rank}" for rank in found.ranks)
    tokens = tuple(found.tokens)
    if found.tokens:
        about = ", ".join(f"{count} vector{'s' * (count > 1)}" for count in found.tokens.values())
    if found.layout == "clip_l + clip_g":  # its keys do not tell the word
        tokens = (read.metadata.get("modelspec.trigger_phrase", path.stem),)
    words, kind = tuple(bundled(read.shapes)), found.kind
    if words:
        kind, about = BUNDLE, f"{about}; {', '.join(words)}"
    loaders = None if words else _loaders(read, found, base)  # of words in a LoRA the kind says it
    place = path.relative_to(root).as_posix()
    return Part(place, kind, found.layout, found.family, tokens, about, words, loaders)


def _loaders(read: Contents, found: Identity, base: str | None) -> tuple[str, ...] | None:
    """The tools whose rules load all of a file, in the names of TOOLS; None where its base is not known."""
    here = base is not None and (base in bases.SHIPPED or Path(base).exists())
    try:
        made = bases.choose(base if here else None, read, found)
    except UserError:
        return None
    loads = tuple(_BY_RULES.get(tool, tool) for tool in account.ask(read, made).loads)
    return loads if loads or here else None  # what fits a shipped base in part is of another one


@dataclass(frozen=True)
class Usage:
    """What the code for diffusers depends on.

    Attributes:
        repo, branch: where the files lie at the Hub.
        base: a Hub id, or the name of what only its user has.
        base_kind: hub; here: a diffusers folder; file: one checkpoint; embedded: it ships with tuner.
        revision: of the base at the Hub.
        family: sd1, sd2 or sdxl.
        inpainting: the base fills holes.
        prompt, negative, size (pixels), steps, guidance: of the example.
        scheduler: settings of the base's scheduler that training changed.
        clip_skip: as web UIs count it, 1 the last layer; None: the family's own.
        windows: windows of 75 tokens that a prompt had at most.
        condition: a condition picture at the Hub.
    """

    repo: str
    branch: str
    base: str
    base_kind: Literal["hub", "here", "file", "embedded"]
    family: str
    prompt: str
    revision: str | None = None
    inpainting: bool = False
    negative: str = ""
    size: int = 512
    steps: int = 20
    guidance: float = 5.0
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    clip_skip: int | None = None
    windows: int = 1
    condition: str | None = None

    @property
    def skipped(self) -> int:
        """How many more layers than the family's own way leaves out, from the end."""
        return 0 if self.clip_skip is None else self.clip_skip - _OWN_LAYER[self.family]


class _Code:
    """Lines of Python with their imports."""

    def __init__(self, usage: Usage) -> None:
        self.usage = usage
        self.imports: dict[str, set[str]] = {}
        self.lines: list[str] = []

    def need(self, module: str, *names: str) -> None:
        self.imports.setdefault(module, set()).update(names)

    @property
    def at(self) -> str:
        """The argument that names the branch."""
        return "" if self.usage.branch == "main" else f", revision={_text(self.usage.branch)}"

    def fetched(self, path: str) -> str:
        """An expression for a file of the repository on the user's disk."""
        self.need("huggingface_hub", "hf_hub_download")
        return f"hf_hub_download({_text(self.usage.repo)}, {_text(path)}{self.at})"

    def text(self) -> str:
        head = ["import torch"]
        modules = sorted(self.imports.items(), key=lambda one: one[0].lower())
        head += [f"from {module} import {', '.join(sorted(names))}" for module, names in modules]
        return "\n".join([*head, "", *self.lines]) + "\n"


def _text(text: str) -> str:
    """A text in Python, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _value(value: Any) -> str:
    return _text(value) if isinstance(value, str) else repr(value)


def diffusers_code(found: list[Part], usage: Usage) -> str | None:
    """A script for one picture with all that diffusers loads of an export; None where it loads nothing."""
    code = _Code(usage)
    code.lines += [
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        'dtype = torch.float16 if device == "cuda" else torch.float32',
    ]
    networks = {_ARGUMENTS[part.kind][0]: part for part in found if part.kind in _ARGUMENTS}
    loads = [line for part in _adapters(found) for line in _adapter(code, part)]
    own = _own_base(code, found, bool(networks))
    if not networks and not loads and own is None:
        return None
    for argument, part in networks.items():
        code.need(_ARGUMENTS[part.kind][1], part.kind)
        place = f"{_text(usage.repo)}, subfolder={_text(part.path)}{code.at}"
        code.lines.append(f"{argument} = {part.kind}.from_pretrained({place}, torch_dtype=dtype)")
    code.lines += _pipeline(code, list(networks), own) + _settings(code) + loads
    code.lines += _call(code, "controlnet" in networks)
    return code.text()


def _adapters(found: list[Part]) -> list[Part]:
    """The files that diffusers loads into a pipeline; of a LoRA in two layouts the first."""
    embeddings = [part for part in found if part.kind == "embedding" and part.layout != "several tensors"]
    loras = [part for part in found if part.kind in (LORA, "DoRA") and (part.layout == "peft" or part.places)]
    return embeddings + loras[:1]


def _adapter(code: _Code, part: Part) -> list[str]:
    usage = code.usage
    if part.kind != "embedding":
        return [f"pipe.load_lora_weights({_text(usage.repo)}, weight_name={_text(part.path)}{code.at})"]
    if part.layout == "one tensor":
        place = f"{_text(usage.repo)}, weight_name={_text(part.path)}, token={_text(part.tokens[0])}"
        return [f"pipe.load_textual_inversion({place}{code.at})"]
    code.need("safetensors.torch", "load_file")
    lines = [f"vectors = load_file({code.fetched(part.path)})"]
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        encoder = f"text_encoder=pipe.text_encoder{number}, tokenizer=pipe.tokenizer{number}"
        lines.append(
            f"pipe.load_textual_inversion(vectors[{_text(key)}], token={_text(part.tokens[0])}, {encoder})"
        )
    return lines


def _own_base(code: _Code, found: list[Part], networks: bool) -> str | None:
    """How a whole pipeline that was exported is loaded; None where there is none.

    A checkpoint beside its trained networks' folders holds the same: the folders need no guess of its kind.
    """
    for part in found:
        if part.kind == "pipeline":
            code.need("huggingface_hub", "snapshot_download")
            code.need("diffusers", "DiffusionPipeline")
            inside = _text(f"{part.path}/*")
            place = f"snapshot_download({_text(code.usage.repo)}, allow_patterns={inside}{code.at})"
            return f'DiffusionPipeline.from_pretrained({place} + "/{part.path}"'
    for part in found:
        if part.kind == "checkpoint" and not networks:
            name = f"{_PIPELINES[code.usage.family]}{'Inpaint' * code.usage.inpainting}Pipeline"
            code.need("diffusers", name)
            return f"{name}.from_single_file({code.fetched(part.path)}"
    return None


def _pipeline(code: _Code, networks: list[str], own: str | None) -> list[str]:
    """The pipeline around the base and the networks that take the place of its own."""
    usage = code.usage
    more = "".join(f", {name}={name}" for name in networks) + ", torch_dtype=dtype).to(device)"
    if own is not None:
        return [f"pipe = {own}{more}"]
    name = "DiffusionPipeline"
    if "controlnet" in networks or usage.base_kind == "file":
        kind = "ControlNet" * ("controlnet" in networks) + "Inpaint" * usage.inpainting
        name = f"{_PIPELINES[usage.family]}{kind}Pipeline"
    code.need("diffusers", name)
    why = {
        "hub": "",
        "here": "  # the base's folder in diffusers layout",
        "file": "  # the base's file",
        "embedded": "  # in a checkout of tuner",
    }
    place = "tuner/embedded" if usage.base_kind == "embedded" else usage.base
    start = "from_single_file" if usage.base_kind == "file" else "from_pretrained"
    at = f", revision={_text(usage.revision)}" if usage.revision and usage.base_kind == "hub" else ""
    return [f"base = {_text(place)}{why[usage.base_kind]}", f"pipe = {name}.{start}(base{at}{more}"]


def _settings(code: _Code) -> list[str]:
    """What training changed in the way the base is sampled and read."""
    usage, lines = code.usage, []
    if usage.scheduler:
        settings = "".join(f", {name}={_value(value)}" for name, value in usage.scheduler.items())
        code.need("diffusers", "DDIMScheduler")  # not every class knows all of them
        lines.append(f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config{settings})")
    if usage.skipped > 0 and usage.family != "sdxl":
        lines += [
            f"# clip skip {usage.clip_skip}",
            'encoder = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).encoder',
            f"encoder.layers = encoder.layers[:-{usage.skipped}]",
        ]
    return lines


def _call(code: _Code, controlled: bool) -> list[str]:
    """One picture of the example's prompt."""
    usage = code.usage
    lines, arguments = [], [f"prompt={_text(usage.prompt)}"]
    if usage.negative:
        arguments.append(f"negative_prompt={_text(usage.negative)}")
    if usage.inpainting:
        code.need("PIL", "Image")
        lines.append('whole, hole = Image.open("picture.png"), Image.open("hole.png")  # white: to be filled')
        arguments += ["image=whole", "mask_image=hole"]
    if controlled:
        code.need("PIL", "Image")
        place = code.fetched(usage.condition) if usage.condition else '"condition.png"'
        lines.append(f'condition = Image.open({place}).convert("RGB")')
        arguments.append(f"{'control_image' if usage.inpainting else 'image'}=condition")
    if usage.skipped and usage.family == "sdxl":
        arguments.append(f"clip_skip={usage.skipped}")
    arguments += [f"height={usage.size}", f"width={usage.size}"]
    arguments += [f"num_inference_steps={usage.steps}", f"guidance_scale={usage.guidance:g}"]
    arguments.append("generator=torch.Generator().manual_seed(0)")
    call = ["picture = pipe(", *(f"    {argument}," for argument in arguments), ").images[0]"]
    return [*lines, *call, 'picture.save("made.png")']
