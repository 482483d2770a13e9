"""A directory for the Hub: weights and settings, and the package's own source for machines that have not installed it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from visualrwkv.checkpoint import convert
from visualrwkv.config import ModelConfig
from visualrwkv.files import text_writers, write_whole
from visualrwkv.hf.modeling import VisualRWKVConfig, VisualRWKVForConditionalGeneration, answer_settings
from visualrwkv.hf.processing import VisualRWKVImageProcessor, VisualRWKVProcessor, WorldTokenizer

CODE, SOURCE = "modeling_visualrwkv", "visualrwkv_source"
AUTO = {
    "AutoConfig": VisualRWKVConfig,
    "AutoModelForImageTextToText": VisualRWKVForConditionalGeneration,
    "AutoModelForCausalLM": VisualRWKVForConditionalGeneration,
    "AutoProcessor": VisualRWKVProcessor,
    "AutoImageProcessor": VisualRWKVImageProcessor,
    "AutoTokenizer": WorldTokenizer,
}


def export(path: str | Path, out: str | Path, vision: str | Path | None = None, **overrides: Any) -> ModelConfig:
    """Write any model as a directory that transformers opens with `trust_remote_code=True`, with or without this package.

    It is a directory of ours as well. Arguments, what is returned, and errors as `convert`.
    """
    out = Path(out)
    if out.suffix == ".pth":
        raise ValueError(f"{out} would be a file; a directory for transformers needs a name without .pth")
    return convert(path, out, vision, beside=files, **overrides)


def files(config: ModelConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """What transformers reads beside the weights: what it adds to our config.json, and texts by the names of the files."""
    where: dict[str, Any] = {name: f"{CODE}.{cls.__name__}" for name, cls in AUTO.items()}
    where["AutoTokenizer"] = [where["AutoTokenizer"], None]  # the slow one, and no fast one
    with tempfile.TemporaryDirectory() as place:
        VisualRWKVProcessor.of(config).save_pretrained(place)
        answer_settings(config.end_of_turn).save_pretrained(place)
        texts = {file.name: file.read_text(encoding="utf-8") for file in sorted(Path(place).iterdir())}
    for name in ("processor_config.json", "tokenizer_config.json"):
        texts[name] = json.dumps(json.loads(texts[name]) | {"auto_map": where}, indent=2) + "\n"
    more = {"architectures": [VisualRWKVForConditionalGeneration.__name__], "auto_map": where}
    return more, texts | code_files()


def write_code(directory: Path) -> None:
    """Put the code that an exported directory's config.json names there."""
    write_whole(text_writers(directory, code_files()))


def code_files() -> dict[str, str]:
    """That code, by the names of its files."""
    return {f"{CODE}.py": code(), f"{SOURCE}.py": source()}


def code() -> str:
    """The file that transformers runs: the installed package, or else the source that came along."""
    names = ", ".join(dict.fromkeys(cls.__name__ for cls in AUTO.values()))
    return f'''"""VisualRWKV for transformers. An installed `visualrwkv` is used, with its compiled kernels; else {SOURCE}.py."""

import pyrwkv_tokenizer  # noqa: F401  (where it is missing, transformers says so before anything is loaded)

try:
    from visualrwkv.hf import {names}
except ImportError:
    from .{SOURCE} import unpack

    unpack()
    from visualrwkv.hf import {names}
'''


def source() -> str:
    """The package without its training as one file of text, with `unpack`."""
    package = Path(__file__).parents[1]
    files = [p.relative_to(package) for p in sorted(package.rglob("*")) if p.suffix in (".py", ".jinja")]
    kept = [p for p in files if p.parts[0] not in ("training", "cli.py")]
    table = "FILES = {\n"
    for file in kept:
        lines = (package / file).read_text(encoding="utf-8").splitlines()
        table += (
            f"    {f'visualrwkv/{file.as_posix()}'!r}: [\n"
            + "".join(f"        {line!r},\n" for line in lines)
            + "    ],\n"
        )
    empty = "FILES: dict[str, list[str]] = {}\n"
    return Path(__file__).with_name("unpack.py").read_text(encoding="utf-8").replace(empty, table + "}\n")
