"""The `visualrwkv` command: thin doors to the package."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tyro

from visualrwkv.commandline import parse, run
from visualrwkv.config import ImagePosition


@dataclass(frozen=True)
class Chat:
    """Talk with a model in the terminal, about a picture or without one."""

    model: str  # a model directory or file
    image: tuple[Path, ...] = ()  # pictures to ask about
    task: Path | None = None  # what state tuning made of this model: where the conversation starts
    device: str = "cpu"
    dtype: str = "float32"
    temperature: float = 0.0  # 0: the likeliest answer
    top_p: float = 1.0
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Bench:
    """Say how long the first token of an answer takes here, and how many follow in a second."""

    model: str  # a model directory or file, or a preset such as rwkv6-1b6, then with random weights
    device: str = "cpu"
    dtype: str = "bfloat16"  # float32, bfloat16, int8 or int4
    prompt: int = 600  # tokens that are read before the first
    tokens: int = 64  # that follow
    batch: int = 1  # answers side by side


@dataclass(frozen=True)
class Compose:
    """Join a language model and a vision encoder into a new model for stage 1."""

    lm: str  # a language model's file, directory or Hub id
    vision: str  # a vision encoder's; or open_clip:NAME:TAG
    out: tyro.conf.Positional[Path]
    preset: str = "nano"  # how they meet: nano, v6.0, HD, UHD, v7.00, v7.01 or WorldRWKV


@dataclass(frozen=True)
class Told:
    """What a released file does not hold, where it is not what its kind is taken for."""

    vision: str | None = None  # the second file of a release in two parts
    image_tokens: int | None = None
    scan: str | None = None
    image_position: str | None = None
    projector: str | None = None
    template: str | None = None  # how turns are written: visualrwkv or world


@dataclass(frozen=True)
class Info(Told):
    """Say what a model file or directory holds."""

    file: tyro.conf.Positional[str] = tyro.MISSING


@dataclass(frozen=True)
class Convert(Told):
    """Write any model as a directory of ours or, where OUT ends in .pth, in the public layout."""

    file: tyro.conf.Positional[str] = tyro.MISSING
    out: tyro.conf.Positional[Path] = tyro.MISSING
    hf: bool = False  # with what transformers needs to open the directory where this package is not installed


@dataclass(frozen=True)
class Merge:
    """Write a model with a LoRA adapter, of ours or of peft, in its weights."""

    model: str  # the model that the adapter was trained on
    adapter: Path  # the adapter's directory: adapter_config.json and adapter_model.safetensors
    out: tyro.conf.Positional[Path]
    dtype: str = "float32"


@dataclass(frozen=True)
class CheckData:
    """Look at every record and picture of a LLaVA file before a run."""

    data: tyro.conf.Positional[Path]
    images: Path | None = None  # what picture paths are relative to; the file's directory unless given
    model: str | None = None  # whose image tokens and prompt count; VisualRWKV-6's 577 a picture unless given
    image_position: ImagePosition | None = None  # the model's unless given
    tokens: int = 8192  # budget of a packed batch
    workers: int = 0  # processes; 0: one a core
    out: Path | None = None  # where check.json and lengths.png go; runs/check-NAME unless given


@dataclass(frozen=True)
class Serve:
    """Serve a model over OpenAI's API: /v1/chat/completions, /v1/responses, /v1/models, /health."""

    model: str  # a model directory or file
    name: str | None = None  # what clients call it; the directory's name unless given
    task: Path | None = None  # what state tuning made of this model: where every conversation starts
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "cpu"
    dtype: str = "float32"
    api_key_file: Path | None = None  # its first line is asked of every client
    allow_urls: bool = False  # fetch pictures from public http(s) addresses
    slots: int = 64  # answers that grow at the same time
    queue: int = 64  # further requests that wait; beyond them 429
    timeout_s: float = 300.0  # of a request
    states: int = 256  # kept for previous_response_id


@dataclass(frozen=True)
class KernelsInfo:
    """Say which compiled kernels are in use."""


def chat(args: list[str]) -> None:
    options = parse(Chat, args)

    from visualrwkv.chat import load
    from visualrwkv.vision.processor import open_picture

    vlm = load(options.model, device=options.device, dtype=options.dtype, task=options.task)
    session = vlm.session([open_picture(p) for p in options.image] or None)
    settings = {"temperature": options.temperature, "top_p": options.top_p, "max_new_tokens": options.max_new_tokens}
    shown = f" about {', '.join(p.name for p in options.image)}" if options.image else ""
    if sys.stdin.isatty():
        print(f"Ask{shown}. /image PATH shows a picture with the next question, /undo takes a turn back, /exit ends.")
    waiting: list[Path] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return
        try:
            if command == "/image":
                open_picture(rest.strip())
                waiting.append(Path(rest.strip()))
            elif command == "/undo":
                session.undo()
            elif line:
                for piece in session.stream(line, list(waiting), **settings):
                    print(piece, end="", flush=True)
                print()
                waiting.clear()
        except (ValueError, FileNotFoundError) as error:
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}")


def bench(args: list[str]) -> None:
    options = parse(Bench, args)

    from visualrwkv.pace import measure

    for name, value in measure(**vars(options)).items():
        print(f"{name:<20}{value}")


def compose(args: list[str]) -> None:
    options = parse(Compose, args)

    from visualrwkv.checkpoint import compose as join
    from visualrwkv.checkpoint import save_model

    save_model(join(options.lm, options.vision, options.preset), options.out)
    print(f"wrote {options.out}")


def told(options: Told) -> dict[str, Any]:
    """What the options say of a file."""
    return {field.name: getattr(options, field.name) for field in fields(Told)}


def info(args: list[str]) -> None:
    options = parse(Info, args)

    from visualrwkv.checkpoint import describe

    for name, value in describe(options.file, **told(options)).items():
        print(f"{name:<20}{value}")


def convert(args: list[str]) -> None:
    options = parse(Convert, args)

    if options.hf:
        from visualrwkv.hf import export

        config = export(options.file, options.out, **told(options))
    else:
        from visualrwkv import checkpoint

        config = checkpoint.convert(options.file, options.out, **told(options))
    if config.vision:
        print(f"{config.image_tokens} image tokens, scan {config.scan}, position {config.image_position}")
    print(f"wrote {options.out}")


def merge(args: list[str]) -> None:
    options = parse(Merge, args)

    from visualrwkv.training.adapt import merge as join

    join(options.model, options.adapter, options.out, options.dtype)
    print(f"wrote {options.out}")


def check_data(args: list[str]) -> None:
    options = parse(CheckData, args)
    if options.tokens < 1:
        raise ValueError(f"tokens is {options.tokens}; it must be at least 1")

    from visualrwkv.checkpoint import read_model
    from visualrwkv.config import CLIP_L_336, MEET_PRESETS, RWKV_PRESETS, ModelConfig
    from visualrwkv.files import locate
    from visualrwkv.training.check import check, write_report

    if options.model:
        config, _ = read_model(locate(options.model))
    else:
        config = ModelConfig(RWKV_PRESETS["rwkv6-1b6"], CLIP_L_336, **MEET_PRESETS["v6.0"].settings(CLIP_L_336))
    images = options.images or options.data.parent
    position = options.image_position or config.image_position
    found, report = check(options.data, images, config, position, options.tokens, options.workers)
    out = options.out or Path("runs") / f"check-{options.data.stem}"
    write_report(out, found, report)
    for name, value in report.items():
        words = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name:<24}{words}")
    for _, words in found.problems[:10]:
        print(words, file=sys.stderr)
    print(f"wrote {out}/check.json and lengths.png")
    if found.problems:
        raise ValueError(
            f"{len(found.problems)} of {report['records']} records cannot be trained on; {out}/check.json has all"
        )


def serve(args: list[str]) -> None:
    options = parse(Serve, args)
    key = None
    if options.api_key_file and not (key := options.api_key_file.read_text().partition("\n")[0].strip()):
        raise ValueError(f"{options.api_key_file} holds no key in its first line")
    try:
        from visualrwkv.serve.limits import Limits
        from visualrwkv.serve.run import serve as run_server
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing; pip install 'visualrwkv[serve]' brings it") from None

    name = options.name or Path(options.model.partition(":")[0]).resolve().stem
    limits = Limits(slots=options.slots, queue=options.queue, timeout_s=options.timeout_s, states=options.states)
    o = options
    run_server(o.model, name, o.host, o.port, o.device, o.dtype, key, o.allow_urls, limits, o.task)


def kernels(args: list[str]) -> None:
    act, *rest = args or [""]
    if act not in ("build", "info"):
        raise ValueError(f"visualrwkv kernels takes build or info, got {' '.join(args) or 'nothing'}")
    if act == "build":
        from visualrwkv.ops.build import main as build

        build(rest)
    else:
        parse(KernelsInfo, rest)
        from visualrwkv.ops.library import describe

        print(*describe(), sep="\n")


COMMANDS = {
    "bench": bench,
    "chat": chat,
    "check-data": check_data,
    "compose": compose,
    "convert": convert,
    "info": info,
    "kernels": kernels,
    "merge": merge,
    "serve": serve,
}


def main() -> None:
    """The console script."""

    def door() -> None:
        name, *args = sys.argv[1:] or ["--help"]
        if name in ("-h", "--help"):
            print(f"usage: visualrwkv {{{','.join(COMMANDS)}}} …\n\nvisualrwkv COMMAND --help says more.")
            return
        if name not in COMMANDS:
            raise ValueError(f"there is no command {name!r}; there are {', '.join(COMMANDS)}")
        COMMANDS[name](args)

    run(door)


if __name__ == "__main__":
    main()
