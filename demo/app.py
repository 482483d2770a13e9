"""A chat about pictures in the browser. What it says comes from `visualrwkv.chat`; here is only the page."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Lock
from typing import Any

import gradio as gr

from visualrwkv.chat import VLM, Session, load
from visualrwkv.checkpoint import size
from visualrwkv.commandline import parse, run
from visualrwkv.serve.errors import ApiError
from visualrwkv.serve.limits import Limits
from visualrwkv.serve.pictures import decode_picture
from visualrwkv.text.prompt import literal
from visualrwkv.text.tokenizer import encode

QUICKSTART = "runs/quickstart/finetune"
SCENES = Path("runs/quickstart/data/images/test")
QUESTIONS = ("Describe the picture.", "How many objects are there?", "What colour is the circle?")
KINDS = ["image"]
PAGE = 4096  # bytes of a page of memory
Message = dict[str, Any]


@dataclass(frozen=True)
class Demo:
    """Open a chat about pictures in the browser."""

    model: str = QUICKSTART  # a model directory or file
    host: str = "127.0.0.1"
    port: int = 7860
    device: str = "cpu"
    dtype: str = "float32"
    task: Path | None = None  # what state tuning made of this model: where every conversation starts


@dataclass
class Talk:
    """One visitor's conversation: the session, and the files of the pictures of each turn, to show them."""

    session: Session
    shown: list[list[str]] = field(default_factory=list)
    speed: float = 0.0
    first_memory: int = 0
    growing: Lock = field(default_factory=Lock)  # held while an answer grows
    stop: Event = field(default_factory=Event)
    place: TemporaryDirectory = field(default_factory=lambda: TemporaryDirectory(prefix="visualrwkv-demo-"))

    def messages(self) -> list[Message]:
        """The conversation as the page shows it."""
        pictures = [[]] * (len(self.session.turns) - len(self.shown)) + self.shown  # a loaded one has none to show
        return [m for (text, answer), files in zip(self.session.turns, pictures) for m in turn(text, files, answer)]

    def turn_at(self, index: int) -> int:
        """The turn that a message belongs to."""
        counts = [0] * (len(self.session.turns) - len(self.shown)) + [len(files) for files in self.shown]
        for number, count in enumerate(counts):
            index -= count + 2
            if index < 0:
                return number
        return len(counts)

    def panel(self) -> str:
        """What the conversation costs."""
        state = self.session.state
        memory = resident()
        self.first_memory = self.first_memory or (memory if self.session.turns else 0)
        return (
            f"| state | tokens read | tokens per second | memory of the process |\n|---|---|---|---|\n"
            f"| {size(state.nbytes()) if state else '–'} | {self.session.tokens:,} | {self.speed:.0f} | "
            f"{size(memory) if memory else '–'}{f', {size(self.first_memory)} after the first turn' if self.first_memory else ''} |"
        )


def turn(text: str, files: list[str], answer: str) -> list[Message]:
    """A question with its pictures, and the answer, as the page shows them."""
    pictures: list[Message] = [{"role": "user", "content": {"path": file}} for file in files]
    asked, said = (
        html.escape(words, quote=False) for words in (text or " ", answer or "…")
    )  # the page would obey tags
    return [*pictures, {"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def resident() -> int:
    """Bytes of memory of this process, or 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * PAGE if statm.exists() else 0


def said_in_the_page(error: Exception) -> gr.Error:
    return gr.Error(f"{error}", duration=8)


class Page:
    """What the page's buttons do. Every visitor has a Talk of their own."""

    def __init__(self, vlm: VLM):
        self.vlm = vlm

    def fresh(self) -> Talk:
        return Talk(self.vlm.session())

    def send(self, message: Message, talk: Talk | None, *controls: Any) -> Iterator[tuple]:
        """Ask what is in the box -> the chat, the panel, the talk, the box."""
        talk = talk or self.fresh()
        text, files = (message.get("text") or "").strip(), list(message.get("files") or [])
        if not text and not files:
            raise said_in_the_page(ValueError("write a question, or add a picture"))
        yield from self.ask(talk, text, files, controls)

    def ask(self, talk: Talk, text: str, files: list[str], controls: tuple) -> Iterator[tuple]:
        def begin() -> Iterator[str]:
            pictures = [decode_picture(Path(file).read_bytes(), Limits()) for file in files]
            return talk.session.stream(literal(text), pictures, **settings(controls))

        if not (yield from self.grow(talk, begin, talk.messages(), text, files)):
            return
        talk.shown.append(files)
        yield talk.messages(), talk.panel(), talk, gr.update(value=None)

    def retry(self, talk: Talk | None, *controls: Any) -> Iterator[tuple]:
        """The last question once more; until the new answer is complete, the old one counts."""
        if not talk or not talk.session.turns:
            raise said_in_the_page(ValueError("there is no answer to try again"))
        text, files = talk.session.turns[-1][0], (talk.shown or [[]])[-1]
        before = talk.messages()[: -2 - len(files)]
        again = partial(talk.session.regenerating, **settings(controls))
        if (yield from self.grow(talk, again, before, text, files)):
            yield talk.messages(), talk.panel(), talk, gr.update()

    def grow(
        self, talk: Talk, begin: Callable[[], Iterator[str]], before: list[Message], text: str, files: list[str]
    ) -> Generator[tuple, None, bool]:
        """The chat while an answer grows -> whether it was completed.

        A mistake is said in the page; after it, and after a stop, the conversation is as before, and the question is in the
        box again.
        """
        if not talk.growing.acquire(blocking=False):
            raise said_in_the_page(ValueError("an answer is still growing; wait for it, or stop it first"))
        talk.stop.clear()
        answer, began = "", 0.0
        try:
            yield [*before, *turn(text, files, "")], talk.panel(), talk, gr.update(value=None)
            for piece in begin():
                if talk.stop.is_set():
                    yield talk.messages(), talk.panel(), talk, {"text": text, "files": files}
                    return False
                began = began or time.perf_counter()
                answer += piece
                yield [*before, *turn(text, files, answer)], gr.skip(), talk, gr.skip()
        except (ValueError, OSError, ApiError) as error:
            yield talk.messages(), talk.panel(), talk, {"text": text, "files": files}
            raise said_in_the_page(error) from error
        finally:
            talk.growing.release()
        if (count := len(encode(answer)) - 1) > 3:  # of fewer there is little to measure
            talk.speed = count / (time.perf_counter() - began)
        return True

    def edit(self, talk: Talk, data: gr.EditData, *controls: Any) -> Iterator[tuple]:
        """Go back to a question, and ask it in other words about the same pictures."""
        number = talk.turn_at(data.index if isinstance(data.index, int) else data.index[0])
        other = talk.session.fork()
        try:
            for _ in range(len(talk.session.turns) - number):
                other.undo()
        except ValueError:
            raise said_in_the_page(ValueError("what was said before the conversation was loaded stays")) from None
        kept = number - (len(talk.session.turns) - len(talk.shown))
        files, trial = talk.shown[kept], replace(talk, session=other, shown=talk.shown[:kept])
        try:
            for chat, panel, _, box in self.ask(trial, html.unescape(str(data.value)).strip(), files, controls):
                yield chat, panel, trial if len(other.turns) > number else talk, box
        except gr.Error:
            yield talk.messages(), talk.panel(), talk, gr.skip()
            raise

    def undo(self, talk: Talk | None) -> tuple:
        """Take the last turn back; its question goes into the box."""
        if not talk or not talk.session.turns:
            raise said_in_the_page(ValueError("there is no turn to undo"))
        text = talk.session.turns[-1][0]
        try:
            talk.session.undo()
        except ValueError as error:
            raise said_in_the_page(error) from error
        files = talk.shown.pop() if talk.shown else []
        return talk.messages(), talk.panel(), talk, {"text": text, "files": files}

    def halt(self, talk: Talk | None) -> None:
        """Break off the answer that grows: nothing of it is shown or remembered."""
        if talk:
            talk.stop.set()

    def save(self, talk: Talk | None) -> Any:
        """The conversation's state as a file to download."""
        if not talk or not talk.session.turns:
            raise said_in_the_page(ValueError("there is nothing to save yet"))
        file = Path(talk.place.name) / "conversation.safetensors"
        talk.session.save(file)
        return gr.update(value=str(file), visible=True)

    def resume(self, file: str) -> tuple:
        """Go on with a saved conversation."""
        try:
            talk = Talk(self.vlm.resume(file))
        except (ValueError, OSError) as error:
            raise said_in_the_page(ValueError(str(error).replace(file, Path(file).name))) from error
        return talk.messages(), talk.panel(), talk, gr.update(value=None)

    def clear(self) -> tuple:
        talk = self.fresh()
        return [], talk.panel(), talk, gr.update(value=None)


def settings(controls: tuple) -> dict[str, Any]:
    """The sampling settings as the page's controls have them."""
    temperature, top_p, top_k, repetition, longest, seed = controls
    chosen = {"temperature": temperature, "top_p": top_p, "top_k": int(top_k), "repetition_penalty": repetition}
    return chosen | {"max_new_tokens": int(longest), "seed": None if seed in (None, -1) else int(seed)}


def make_page(vlm: VLM, name: str) -> gr.Blocks:
    """The page."""
    page = Page(vlm)
    with gr.Blocks(title="VisualRWKV", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.Markdown(f"# VisualRWKV\n{name}: pictures and conversation live in a state of constant size.")
        talk = gr.State(None, time_to_live=86400)
        chat = gr.Chatbot(
            label="Conversation",
            height=440,
            editable="user",
            group_consecutive_messages=False,  # in a group only the first is edited, and that is the picture
            buttons=["copy"],
            render_markdown=False,
            elem_id="chat",
        )
        box = gr.MultimodalTextbox(
            file_count="multiple",
            file_types=KINDS,
            placeholder="Ask; add or paste pictures",
            show_label=False,
            elem_id="box",
        )
        panel = gr.Markdown(page.fresh().panel(), elem_id="panel")
        with gr.Row():
            stop, retry, undo, clear = (gr.Button(text) for text in ("Stop", "Retry", "Undo", "New conversation"))
            save = gr.Button("Save conversation")
            resume = gr.UploadButton("Load conversation", file_types=[".safetensors"])
        saved = gr.File(label="The conversation's state", visible=False, interactive=False, elem_id="saved")
        with gr.Accordion("Sampling", open=False):
            controls = [
                gr.Slider(0, 2, 0, step=0.05, label="temperature (0: the likeliest answer)"),
                gr.Slider(0.05, 1, 1, step=0.05, label="top_p"),
                gr.Slider(0, 200, 0, step=1, label="top_k (0: all)"),
                gr.Slider(1, 2, 1, step=0.05, label="repetition penalty"),
                gr.Slider(1, 1024, 256, step=1, label="longest answer, in tokens"),
                gr.Number(-1, precision=0, label="seed (-1: another each time)"),
            ]
        files = sorted(SCENES.glob("*.png"))[: len(QUESTIONS)] if vlm.processor else []
        if files:
            given = [[{"text": q, "files": [str(f)]}] for q, f in zip(QUESTIONS, files)]
            gr.Examples(given, [box], label="Examples")
        all_of_it = [chat, panel, talk, box]
        growing = [
            box.submit(page.send, [box, talk, *controls], all_of_it, show_progress="hidden"),
            retry.click(page.retry, [talk, *controls], all_of_it, show_progress="hidden"),
            chat.edit(page.edit, [talk, *controls], all_of_it, show_progress="hidden"),
        ]
        stop.click(page.halt, [talk], None, queue=False)
        undo.click(page.undo, [talk], all_of_it)
        chat.clear(page.clear, None, all_of_it, cancels=growing)
        clear.click(page.clear, None, all_of_it, cancels=growing)
        save.click(page.save, [talk], [saved])
        resume.upload(page.resume, [resume], all_of_it)
    return blocks


def main() -> None:
    options = parse(Demo)
    if options.model == QUICKSTART and not Path(QUICKSTART).exists():
        raise FileNotFoundError(
            f"there is no {QUICKSTART}; give a model with --model, or run scripts/quickstart.sh first"
        )
    vlm = load(options.model, device=options.device, dtype=options.dtype, task=options.task)
    blocks = make_page(vlm, Path(options.model).name).queue(default_concurrency_limit=4, max_size=64)
    look = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )  # nothing fetched
    blocks.launch(server_name=options.host, server_port=options.port, theme=look, max_file_size="20mb", show_error=True)


if __name__ == "__main__":
    run(main)
