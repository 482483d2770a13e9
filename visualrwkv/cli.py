"""The `visualrwkv` command: thin doors to the package."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from visualrwkv.commandline import parse, run


@dataclass(frozen=True)
class Chat:
    """Talk with a model in the terminal, about a picture or without one."""

    model: str  # a model directory or file
    image: tuple[Path, ...] = ()  # pictures to ask about
    device: str = "cpu"
    dtype: str = "float32"
    temperature: float = 0.0  # 0: the likeliest answer
    top_p: float = 1.0
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Compose:
    """Join a language model and a vision encoder into a new model for stage 1."""

    lm: str
    vision: str
    out: Path
    preset: str = "nano"


@dataclass(frozen=True)
class Info:
    """Say which compiled kernels are in use."""


def chat(args: list[str]) -> None:
    options = parse(Chat, args)

    from visualrwkv.chat import load
    from visualrwkv.vision.processor import open_picture

    vlm = load(options.model, device=options.device, dtype=options.dtype)
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


def compose(args: list[str]) -> None:
    options = parse(Compose, args)

    from visualrwkv.checkpoint import compose as join
    from visualrwkv.checkpoint import save_model

    save_model(join(options.lm, options.vision, options.preset), options.out)
    print(f"wrote {options.out}")


def kernels(args: list[str]) -> None:
    act, *rest = args or [""]
    if act not in ("build", "info"):
        raise ValueError(f"visualrwkv kernels takes build or info, got {' '.join(args) or 'nothing'}")
    if act == "build":
        from visualrwkv.ops.build import main as build

        build(rest)
    else:
        parse(Info, rest)
        from visualrwkv.ops.library import describe

        print(*describe(), sep="\n")


COMMANDS = {"chat": chat, "compose": compose, "kernels": kernels}


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
