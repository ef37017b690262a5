"""What SECURITY.md promises: what others made is never run, and nothing private is told."""

from __future__ import annotations

import ast
import hashlib
import html
import json
import socket
from collections.abc import Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]

HOSTILE = (
    "a toy <script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{0.__class__.__mro__} {} {caption}",
    "%s %(name)s %n",
    "${HOME} $(touch ran) `touch ran`",
    "{{ 7 * 7 }} {% include '/etc/passwd' %} {# gone #}",
)
NAMES = ("<img src=x onerror=alert(1)>", "{0.__class__}", "%s%n", "$(touch ran)", "{{7*7}}", "a&b'c\"d")
SECRETS = {
    "HF_TOKEN": "hf_PlantedTokenQZ",
    "HUGGING_FACE_HUB_TOKEN": "hf_PlantedOldQZ",
    "WANDB_API_KEY": "PlantedWandbQZ",
}
USER, HOST, PASSWORD = "planteduserqz", "plantedhostqz", "plantedpasswordqz"
PICKLE = b"\x80\x02cos\nsystem\nq\x00X\x09\x00\x00\x00touch ranq\x01\x85q\x02Rq\x03."
"""A pickle that makes a file `ran` when it is read."""


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def picture(number: int) -> bytes:
    stream = BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


def write_set(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, (name, caption) in enumerate(zip(NAMES, HOSTILE, strict=True)):
        (folder / f"{name}.png").write_bytes(picture(number))
        (folder / f"{name}.txt").write_text(caption)
    return folder


def write_recipe(home: Path, base: Path, **more: Any) -> Path:
    """A recipe in which every place is written in full, as a user may do it."""
    tree: dict[str, Any] = {
        "base": str(base),
        "method": {"lora": {"rank": 2}},
        "data": {
            "source": str(home / "pictures"),
            "heldout": str(home / "heldout"),
            "resolution": 64,
            "cache": str(home / "cache"),
            "workers": 0,
            "captions": {"templates": ["a picture: {}"]},
        },
        "train": {
            "steps": 2,
            "batch_size": 3,
            "learning_rate": 0.001,
            "precision": "fp32",
            "threads": 1,
            "checkpoint": {"every": 1},
        },
        "preview": {"every": 2, "steps": 1, "prompts": list(HOSTILE)},
        "validate": {"every": 1, "samples": 2},
        "export": {"dtype": "fp32", "tag_frequency": True},
        "log": {"tensorboard": True},
        "output": str(home / "out"),
    }
    place = home / "mine.yaml"
    made = StringIO()
    YAML(typ="safe", pure=True).dump(tree | more, made)
    place.write_text(made.getvalue())
    return place


class Ran:
    """A finished run by a user with secrets, in a home of their own."""

    def __init__(self, home: Path, said: str) -> None:
        self.home, self.said, self.output = home, said, home / "out"

    def files(self) -> dict[str, bytes]:
        return {
            str(p.relative_to(self.output)): p.read_bytes() for p in self.output.rglob("*") if p.is_file()
        }


@pytest.fixture(scope="module")
def ran(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    import contextlib
    import shutil

    from tuner.cli import main

    home = tmp_path_factory.mktemp("home") / USER
    home.mkdir()
    base = shutil.copytree(sd1_folder, home / "tiny-sd1")
    write_set(home / "pictures")
    write_set(home / "heldout")
    patch = pytest.MonkeyPatch()
    for name, value in SECRETS.items():
        patch.setenv(name, value)
    for name, value in {"HOME": str(home), "USER": USER, "LOGNAME": USER, "HOSTNAME": HOST}.items():
        patch.setenv(name, value)
    patch.setattr(socket, "gethostname", lambda: HOST)
    patch.chdir(home)
    AcceleratorState._reset_state(True)
    said = StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(["train", str(write_recipe(home, base))])
        assert code == 0, said.getvalue()
        pushed = ["push", str(home / "out"), "tester/thing", "--licence", "apache-2.0", "--dry-run"]
        assert main(pushed) == 0, said.getvalue()
    yield Ran(home, said.getvalue())
    patch.undo()


def private(ran: Ran) -> list[bytes]:
    return [word.encode() for word in (USER, HOST, str(ran.home))]


def test_no_token_is_anywhere(ran: Ran) -> None:
    """Neither in what a run writes, nor in its cache, nor in what it says."""
    files = [p for p in ran.home.rglob("*") if p.is_file()]
    assert len(files) > 40
    for secret in SECRETS.values():
        assert secret not in ran.said
        told = [str(p) for p in files if secret.encode() in p.read_bytes() or secret in p.name]
        assert told == []


def test_nothing_private_is_in_exports_cards_and_logs(ran: Ran) -> None:
    from tuner.push import Wish, parcel

    files = ran.files()
    packed = parcel.pack(ran.output, Wish("tester/thing", "main", False, "apache-2.0", None, None))
    given = {f"push: {n}": s if isinstance(s, bytes) else s.read_bytes() for n, s in packed.files.items()}
    # These hold the recipe as its user wrote it, and say where a run was: they stay in OUTPUT.
    own = {"recipe.yaml", "report.html", "finished.json"}
    manifests = {name for name in files if name.startswith("checkpoints/") and name.endswith(".json")}
    assert own <= files.keys() and len(manifests) >= 1
    given |= {name: data for name, data in files.items() if name not in own | manifests}
    kinds = (
        "export/",
        "push: ",
        "tensorboard/",
        "previews/",
        "metrics.jsonl",
        "versions.json",
        "checkpoints/",
    )
    for kind in kinds:
        assert any(name.startswith(kind) for name in given), kind
    seen = 0
    for name, data in given.items():
        for word in private(ran):
            assert word not in data and word.decode() not in name, (name, word)
            seen += 1
    assert seen == 3 * len(given) and len(given) >= 15
    # The search finds what is there.
    assert any(word in files["recipe.yaml"] for word in private(ran))
    assert USER in str(ran.home) and HOST not in files["report.html"].decode()


def test_captions_stay_what_they_are(ran: Ran) -> None:
    """Nothing in them is evaluated, formatted, or taken for a template or a tag."""
    about = json.loads((ran.output / "previews" / "step-000002.json").read_text())
    assert about["prompts"] == list(HOSTILE)[: len(about["prompts"])] and len(about["prompts"]) >= 4
    page = (ran.output / "report.html").read_text()
    shown = 0
    for caption in HOSTILE[: len(about["prompts"])]:
        assert str(html.escape(caption)).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page, (
            caption
        )
        shown += 1
    assert shown >= 4
    assert "<script>alert" not in page and "<img src=x" not in page and ">49<" not in page
    assert not list(ran.home.rglob("ran"))
    from tuner.push import Wish, parcel

    card = parcel.pack(ran.output, Wish("tester/thing", "main", False, "apache-2.0", None, None)).card
    body, blocks = card.split("---\n", 2)[2], {"python": "", "yaml": ""}
    fence = ""
    for line in body.splitlines():  # within ` or a fence Markdown shows it as it is
        if line.startswith("```"):
            fence = "" if fence else line.strip("`")
        elif fence:
            blocks[fence] += line + "\n"
        else:
            plain = "" if line.count("`") >= 2 else line
            assert "<script" not in plain and "<img" not in plain, line
    # What is to be copied holds a caption as a plain literal, whatever its signs.
    literals = [
        node.value for node in ast.walk(ast.parse(blocks["python"])) if isinstance(node, ast.Constant)
    ]
    assert HOSTILE[0] in literals and YAML(typ="safe", pure=True).load(blocks["yaml"])["preview"]["prompts"]


def test_a_page_of_hostile_names_and_words(tmp_path: Path) -> None:
    """Whatever lies in an output folder, a report only shows it."""
    from tuner import report

    output = tmp_path / "out"
    (output / "previews").mkdir(parents=True)
    (output / "evaluation").mkdir()
    (output / "export" / NAMES[0]).mkdir(parents=True)
    (output / "previews" / "step-000001.png").write_bytes(picture(0))
    (output / "previews" / "step-000001.json").write_text(
        json.dumps({"columns": HOSTILE, "prompts": HOSTILE})
    )
    (output / "evaluation" / f"{NAMES[0]}.png").write_bytes(picture(1))
    (output / "export" / NAMES[0] / f"{NAMES[4]}.safetensors").write_bytes(b"")
    lines: list[dict[str, Any]] = [{"step": 1, "loss": 1.0}, {"step": 1, "event": HOSTILE[0]}]
    rows = {caption: [caption] for caption in HOSTILE}
    lines += [
        {"measure": HOSTILE[1], "values": {"verdict": HOSTILE[0], "columns": [HOSTILE[1]], "rows": rows}}
    ]
    lines += [{"measure": "place", "values": {"picture": "../../../etc/passwd"}}]
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (output / "recipe.yaml").write_text(f"method: {json.dumps(HOSTILE[0])}\n")
    (output / "versions.json").write_text(json.dumps({HOSTILE[0]: HOSTILE[5]}))
    page = report.write(output).read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and "root:" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 5 and "{{ 7 * 7 }}" in page and "{0.__class__" in page
    assert "the picture ../../../etc/passwd is named by a measure and not in the output folder" in page


def test_a_template_puts_a_caption_in_as_it_is() -> None:
    from tuner.data.captions import CaptionRule

    rule = CaptionRule(templates=("a {} b",), prefix="p ", suffix=" s")
    made = [rule([caption], 0, 0, 0) for caption in HOSTILE]
    assert made == [f"p a {caption} b s" for caption in HOSTILE] and len(made) == 6


def test_an_address_is_told_without_its_password() -> None:
    from tuner.export import metadata

    address = f"https://me:{PASSWORD}@host.example/a/{{000..009}}.tar?token={PASSWORD}#{PASSWORD}"
    text = metadata.recipe_text({"data": {"source": [{"path": address}]}})
    assert PASSWORD not in text and "https://host.example/a/{000..009}.tar" in text
    made = metadata.build(
        "controlnet",
        name="a",
        recipe_text=text,
        versions={},
        base_name="b",
        base_digest="{}",
        data_digests={address: "0"},
        extra={},
    )
    assert PASSWORD not in json.dumps(made) and "host.example" in made["tuner.data"]


def test_a_checkpoint_with_a_pickle_is_not_run(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Even one whose manifest vouches for it."""
    import shutil

    from tuner.cli import main

    home = shutil.copytree(ran.home, tmp_path / "copy")
    monkeypatch.chdir(home)
    place = sorted((home / "out" / "checkpoints").iterdir())[0]
    state = next(file for file in place.iterdir() if file.suffix == ".pt")
    state.write_bytes(PICKLE)
    manifest = json.loads((place / "manifest.json").read_text())
    assert state.name in manifest["files"]
    manifest["files"][state.name] = hashlib.sha256(PICKLE).hexdigest()
    (place / "manifest.json").write_text(json.dumps(manifest))
    words = [f"train.resume={place}", f"output={home / 'again'}"]
    assert main(["train", str(home / "mine.yaml"), *words]) == 2
    told = capfd.readouterr().err
    assert "Traceback" not in told and str(place) in told, told
    assert not list(home.rglob("ran"))


# ---- what the code may not do

FORBIDDEN = {
    "eval": "evaluates text",
    "exec": "runs text",
    "compile": "compiles text",
    "__import__": "imports by a computed name",
    "os.system": "a shell",
    "os.popen": "a shell",
    "pickle.load": "a pickle",
    "pickle.loads": "a pickle",
    "pickle.Unpickler": "a pickle",
    "marshal.loads": "code",
    "shelve.open": "a pickle",
    "joblib.load": "a pickle",
    "dill.load": "a pickle",
    "shutil.unpack_archive": "an archive without a look at its names",
    "torch.hub.load": "remote code",
}
UNPACKS = ("extractall", "extract")


def faults(source: str) -> list[str]:
    """What is forbidden in a module, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            found += [f"{node.lineno}: {n}" for n in names if n in ("yaml", "dill", "cloudpickle", "joblib")]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {one.arg: one.value for one in node.keywords}
        values = {key: getattr(value, "value", None) for key, value in given.items()}
        wrong = name in FORBIDDEN
        wrong |= name == "torch.load" and values.get("weights_only") is not True
        wrong |= name in ("np.load", "numpy.load") and "allow_pickle" in given
        wrong |= name.rpartition(".")[2] in UNPACKS and name != "self.extract"
        wrong |= name.rpartition(".")[2] == "Environment" and values.get("autoescape") is not True
        wrong |= name == "Markup" or name.endswith(".Markup")
        wrong |= name == "YAML" and values.get("typ") != "safe"
        wrong |= "trust_remote_code" in given and values["trust_remote_code"] is not False
        wrong |= "use_safetensors" in given and values["use_safetensors"] is not True
        wrong |= bool(values.get("shell"))
        if wrong:
            found.append(f"{node.lineno}: {ast.unparse(node)[:80]}")
    return found


BAD = """
eval(x); exec(x); os.system(x); pickle.loads(x); torch.load(x); torch.load(x, weights_only=False)
tar.extractall(p); Environment(); Environment(autoescape=False); YAML(); YAML(typ="unsafe")
f(trust_remote_code=True); f(use_safetensors=False); subprocess.run(x, shell=True)
np.load(x, allow_pickle=True)
import yaml
"""
GOOD = 'torch.load(x, weights_only=True); Environment(autoescape=True); YAML(typ="safe"); model.eval()'


def test_the_code_does_nothing_that_is_forbidden() -> None:
    assert len(faults(BAD)) == 16 and faults(GOOD) == []
    files = sorted((ROOT / "tuner").rglob("*.py"))
    assert len(files) > 150
    wrong = [f"{file.relative_to(ROOT)}:{one}" for file in files for one in faults(file.read_text())]
    assert wrong == []
    loads = sum(file.read_text().count("torch.load(") for file in files)
    assert loads >= 1  # so that the rule above has something to look at


def test_programs_are_started_in_one_place() -> None:
    """`prepare.py` beside a set that is not there yet; SECURITY.md says so."""
    files = sorted((ROOT / "tuner").rglob("*.py"))
    starts = {
        str(file.relative_to(ROOT / "tuner"))
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).startswith(("subprocess.", "os.exec", "os.spawn"))
    }
    assert starts == {"data/sources/folder.py"}


def test_pages_escape() -> None:
    pages = sorted((ROOT / "tuner").rglob("*.j2"))
    assert len(pages) >= 1
    for page in pages:
        text = page.read_text()
        assert "|safe" not in text.replace(" ", "") and "autoescape" not in text, page
        assert "default-src 'none'" in text, page


def test_what_is_promised_is_written_down() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    for word in ("pickle", "safetensors", "prepare.py", "data.max_pixels", "recipe.yaml", "HF_TOKEN"):
        assert word in text, word
