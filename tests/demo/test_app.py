"""The demo in a real browser, where there is one; its server alone where there is none."""

import re
import shutil
import socket
import threading

import gradio as gr
import pytest
from playwright.sync_api import expect, sync_playwright

from demo.app import make_page
from visualrwkv.chat import VLM

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT = 20_000
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")


@pytest.fixture(scope="module")
def vlm(tiny_model):
    return VLM(tiny_model())


@pytest.fixture(scope="module")
def address(vlm):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    blocks = make_page(vlm, "tiny").queue()
    look = gr.themes.Default(font=["sans-serif"], font_mono=["monospace"])
    blocks.launch(server_port=port, prevent_thread_lock=True, quiet=True, theme=look, max_file_size="20mb")
    yield f"http://127.0.0.1:{port}"
    blocks.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page()
    page.goto(address)
    expect(page.locator("#box textarea")).to_be_visible(timeout=WAIT)
    yield page
    page.close()


@pytest.fixture(scope="module")
def png(picture, tmp_path_factory):
    file = tmp_path_factory.mktemp("pictures") / "a.png"
    picture(0).save(file)
    return file


def ask(page, text, *files):
    if files:
        page.locator("#box input[type=file]").set_input_files([str(file) for file in files])
        expect(page.locator("#box .thumbnail-item").first).to_be_visible(timeout=WAIT)
    page.locator("#box textarea").fill(text)
    page.locator("#box textarea").press("Enter")


def test_a_conversation_in_the_browser(page, vlm, png, picture, browser, address, tmp_path):
    """Upload, ask, ask on, undo, retry, save, and go on in a new page."""
    session = vlm.session()
    ask(page, "What is this?", png)
    session.ask("What is this?", picture(0))
    expect(page.locator("#panel td").nth(1)).to_have_text(f"{session.tokens:,}", timeout=WAIT)
    expect(page.locator("#chat img").first).to_be_visible()
    ask(page, "Is <image> a tag?")
    session.ask("Is <image> a tag?")
    expect(page.locator("#panel td").nth(1)).to_have_text(f"{session.tokens:,}", timeout=WAIT)
    expect(page.locator("#chat")).to_contain_text("Is <image> a tag?")
    both = session.tokens
    page.get_by_role("button", name="Undo", exact=True).last.click()
    session.undo()
    expect(page.locator("#panel td").nth(1)).to_have_text(f"{session.tokens:,}", timeout=WAIT)
    expect(page.locator("#box textarea")).to_have_value("Is <image> a tag?")
    page.locator("#box textarea").press("Enter")
    expect(page.locator("#panel td").nth(1)).to_have_text(f"{both:,}", timeout=WAIT)
    page.get_by_role("button", name="Retry", exact=True).last.click()
    expect(page.locator("#panel td").nth(1)).to_have_text(f"{both:,}", timeout=WAIT)
    page.get_by_role("button", name="Save conversation").click()
    with page.expect_download(timeout=WAIT) as download:
        page.locator("#saved a").first.click()
    file = tmp_path / "c.safetensors"
    download.value.save_as(file)
    session.ask("Is <image> a tag?")
    assert vlm.resume(file).turns == session.turns
    other = browser.new_page()
    other.goto(address)
    with other.expect_file_chooser() as chooser:
        other.get_by_role("button", name="Load conversation").click()
    chooser.value.set_files(str(file))
    expect(other.locator("#panel td").nth(1)).to_have_text(f"{both:,}", timeout=WAIT)
    ask(other, "Why?")
    session.ask("Why?")
    expect(other.locator("#panel td").nth(1)).to_have_text(f"{session.tokens:,}", timeout=WAIT)
    expect(page.locator("#panel td").nth(1)).to_have_text(f"{both:,}"), "the other visitor's page is as it was"
    other.close()


def test_a_question_is_edited(page, vlm, png, picture):
    """It is asked in other words, and what it was is forgotten."""
    session = vlm.session()
    ask(page, "What?", png)
    session.ask("What?", picture(0))
    expect(page.locator("#panel td").nth(1)).to_have_text(f"{session.tokens:,}", timeout=WAIT)
    ask(page, "Why?")
    session.ask("Why?")
    expect(page.locator("#panel td").nth(1)).to_have_text(f"{session.tokens:,}", timeout=WAIT)
    page.locator("#chat").get_by_role("button", name="Edit").last.click()
    page.locator("#chat textarea").last.fill("Whose?")
    page.locator("#chat").get_by_role("button", name="Submit").last.click()
    session.undo()
    session.ask("Whose?")
    expect(page.locator("#panel td").nth(1)).to_have_text(f"{session.tokens:,}", timeout=WAIT)
    expect(page.locator("#chat")).not_to_contain_text("Why?")
    buttons = page.locator("#chat").get_by_role("button", name="Edit")
    buttons.nth(buttons.count() - 2).click()  # of the question about the picture
    page.locator("#chat textarea").last.fill("What shape is it?")
    page.locator("#chat").get_by_role("button", name="Submit").last.click()
    session = vlm.session()
    session.ask("What shape is it?", picture(0))
    expect(page.locator("#panel td").nth(1)).to_have_text(f"{session.tokens:,}", timeout=WAIT)
    expect(page.locator("#chat img").first).to_be_visible()
    expect(page.locator("#chat")).not_to_contain_text("Whose?")


def test_stop_leaves_no_trace(page, vlm, monkeypatch):
    """An answer that does not end is broken off, and the next question is answered."""
    gate = threading.Event()

    def slow(self, *_, **__):
        yield "Well"
        while not gate.wait(0.05):
            yield " well"

    with monkeypatch.context() as patch:
        patch.setattr("visualrwkv.chat.Session.stream", slow)
        ask(page, "Hello")
        expect(page.locator("#chat")).to_contain_text("Well well well", timeout=WAIT)
        page.get_by_role("button", name="Stop", exact=True).last.click()
        expect(page.locator("#chat")).not_to_contain_text("Well well", timeout=WAIT)
    gate.set()
    session = vlm.session()
    session.ask("Hello")
    ask(page, "Hello")
    expect(page.locator("#panel td").nth(1)).to_have_text(f"{session.tokens:,}", timeout=WAIT)


def test_mistakes_are_said_in_the_page(page, tmp_path, vlm):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    ask(page, "What?", tmp_path / "broken.png")
    expect(page.get_by_text(re.compile("a picture is none of PNG, JPEG"))).to_be_visible(timeout=WAIT)
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Load conversation").click()
    chooser.value.set_files(str(tmp_path / "other.safetensors"))
    expect(page.get_by_text(re.compile("is no saved conversation"))).to_be_visible(timeout=WAIT)
