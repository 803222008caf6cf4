"""The web demo in a real browser, as people use it: type, click, wait, look."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from typer.testing import CliRunner

from piflow.apps.png import read_settings
from piflow.apps.web import page as web
from piflow.apps.web.generation import Request, draw, sheet
from piflow.apps.web.models import FAMILIES, Model, load_digits, load_text_model
from piflow.cli import app
from piflow.pipelines import PiDiTPipeline
from piflow.schedulers import FlowMapSDEScheduler
from tests.apps.tiny_models import save_tiny
from tests.pipelines.tiny import picture

pytestmark = pytest.mark.slow

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
HERE = ("127.0.0.1", "localhost", "::1")


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[Any]]:
    """Where this process, the server, has connected to or asked the way to, but for this machine."""
    seen: list[Any] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def watched_connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in HERE:
            seen.append(address)
        connect(self, address)

    def watched_look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if host not in HERE:
            seen.append(host)
        return look_up(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched_connect)
        patch.setattr(socket, "getaddrinfo", watched_look_up)
        yield seen


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("models")
    text = {
        family: load_text_model(family, *save_tiny(family, folder), device="cpu", dtype=torch.float32)
        for family in FAMILIES
    }
    return {"digits": load_digits(), **text}


@pytest.fixture(scope="module")
def address(models: dict[str, Model], addresses: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        demo = web.build(models)
        yield web.launch(demo)
        demo.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        found = next((path for path in map(shutil.which, names) if path), None)
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


class Visitor:
    """Somebody with the page open, who sees nothing go wrong and nothing come from elsewhere."""

    def __init__(self, browser: Browser, address: str, tab: str = "digits", **screen: Any) -> None:
        self.name, self.address = tab, address
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **screen})
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.asked_for: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked_for.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.goto(address)
        self.page.locator("#digits-draw").wait_for()
        if tab != "digits":
            self.page.get_by_role("tab", name=FAMILIES[tab].title).click()
            self.part("draw").wait_for()

    def part(self, name: str) -> Any:
        return self.page.locator(f"#{self.name}-{name}")

    def type(self, **values: str) -> Visitor:
        for name, value in values.items():
            field = self.part(name).locator("textarea, input[type=number]").first
            field.fill(value)
            field.blur()
        return self

    def choose(self, who: str) -> Visitor:
        self.part("shown").get_by_label(who, exact=True).check()
        return self

    def click(self, name: str = "draw") -> Visitor:
        self.part(name).click()
        return self

    def sees(self, network: str = "student", other_than: str | None = None) -> tuple[str, Image.Image]:
        """The address of the picture, once there is one, and its pixels."""
        image = self.part(f"{network}-image").locator("img")
        image.wait_for()
        if other_than is not None:
            expect(image).not_to_have_attribute("src", other_than, timeout=60_000)
        tracker = self.part(f"{network}-image").get_by_test_id("status-tracker")
        expect(tracker).to_have_class(re.compile(r"\bhide\b"))  # all that was asked for is there
        source = image.get_attribute("src")
        loaded = "place => (image => image.complete && image.naturalWidth > 0)(document.querySelector(place))"
        self.page.wait_for_function(loaded, arg=f"#{self.name}-{network}-image img")
        return source, Image.open(io.BytesIO(self.context.request.get(source).body()))

    def shows(self, network: str, picture: Image.Image) -> bool:
        """Whether this picture, of its own size, is in the middle of the network's place on the screen: uncovered."""
        image = self.part(f"{network}-image").locator("img")
        image.wait_for()
        shown = Image.open(io.BytesIO(image.screenshot()))
        left, top = (shown.width - picture.width) // 2, (shown.height - picture.height) // 2
        middles = [
            (left + i, top + j, left + i + picture.width, top + j + picture.height) for i in (0, 1) for j in (0, 1)
        ]
        return any(same(shown.crop(middle), picture) for middle in middles)

    def is_told(self, message: str) -> None:
        toast = self.page.locator(".toast-body").filter(has_text=message)
        toast.wait_for()
        toast.locator("button").last.click()
        expect(toast).to_have_count(0)


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Callable[..., Visitor]]:
    visitors: list[Visitor] = []

    def open_page(tab: str = "digits", **screen: Any) -> Visitor:
        visitors.append(Visitor(browser, address, tab, **screen))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.context.close()
        assert visitor.complaints == []
        assert {url for url in visitor.asked_for if not url.startswith((address, "data:", "blob:"))} == set()


def same(ours: Image.Image, theirs: Image.Image) -> bool:
    ours, theirs = ours.convert("RGB"), theirs.convert("RGB")
    return ours.size == theirs.size and bool((np.asarray(ours) == np.asarray(theirs)).all())


def test_digits(visit: Callable[..., Visitor], models: dict[str, Model], tmp_path: Path) -> None:
    """Type, click, wait: the picture is the library's own of that seed, and the download says how it was made."""
    visitor = visit().type(prompt="2 7 1", seed="9", width="40").click()
    _, seen = visitor.sees()
    pipe = PiDiTPipeline(models["digits"].networks["student"], vae=None, scheduler=FlowMapSDEScheduler())
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(9)
    theirs = sheet(
        pipe([2, 7, 1], num_inference_steps=4, total_substeps=64, temperature=1, generator=generator).images, 40
    )
    assert same(seen, theirs)
    assert np.asarray(seen).std() > 40  # neither blank nor grey
    visitor.page.screenshot(path=tmp_path / "page.png")
    assert visitor.shows("student", theirs)

    with visitor.page.expect_download() as download:
        visitor.click("student-png")
    assert download.value.suggested_filename == "piflow-digits-student-4-steps-seed-9.png"
    settings = read_settings(download.value.path())
    assert (settings["class"], settings["seed"], settings["nfe"], settings["temperature"]) == ([2, 7, 1], 9, 4, 1)
    with Image.open(download.value.path()) as file:
        assert same(file, theirs)


def test_side_by_side(visit: Callable[..., Visitor], models: dict[str, Model]) -> None:
    """Student and base model with as many steps, one strip each, and either of them alone."""
    visitor = visit().type(prompt="5", nfe="2").choose("Both").click()
    source, student = visitor.sees()
    _, base = visitor.sees("base")
    request = Request("5", width=96, nfe=2, total_substeps=64, temperature=1)
    assert same(student, draw(models["digits"], "student", request).image)
    assert same(base, draw(models["digits"], "base", request).image)
    expect(visitor.part("student-caption")).to_contain_text("2 steps, 2 network evaluations, ")
    expect(visitor.part("base-caption")).to_contain_text("2 steps, 4 network evaluations (guidance), ")
    for network in ("student", "base"):
        captions = visitor.part(f"{network}-steps").locator("figcaption")
        expect(captions).to_have_text(["Step 1, to noise level 0.50", "Step 2, to noise level 0.00"])
        drawn = visitor.part(f"{network}-steps").locator("img").evaluate_all("all => all.map(i => i.naturalWidth)")
        assert drawn == [96, 96]

    visitor.type(seed="1").choose("Student").click().sees(other_than=source)
    expect(visitor.part("base-image")).to_be_hidden()
    visitor.choose("Base").click().sees("base")
    expect(visitor.part("student-image")).to_be_hidden()


def test_the_students_picture_comes_first(visit: Callable[..., Visitor], models: dict[str, Model]) -> None:
    """While the base model is still drawing it is to be seen, with all that belongs to it, and nothing over it."""
    request = Request("5", seed=2, width=96, nfe=2, total_substeps=64, temperature=1)
    student, base = (draw(models["digits"], network, request).image for network in ("student", "base"))
    visitor = visit().type(prompt="5", seed="1", nfe="2").choose("Both").click()
    visitor.sees("base")  # of an earlier request, which is not to stand beside the new one
    gate = Event()

    def held(*_: Any) -> None:
        gate.wait(60)

    hook = models["digits"].networks["base"].register_forward_pre_hook(held)
    try:
        visitor.type(seed="2").click()
        expect(visitor.part("base-image")).to_contain_text("Base model, step 1 of 2")
        expect(visitor.part("base-image").locator("img")).to_have_count(0)
        expect(visitor.part("base-caption")).to_have_text("")
        expect(visitor.part("base-steps")).to_be_hidden()
        assert visitor.shows("student", student)
        expect(visitor.part("student-image").get_by_test_id("status-tracker")).to_be_hidden()
        expect(visitor.part("student-caption")).to_contain_text("2 steps, 2 network evaluations, ")
        expect(visitor.part("student-steps").locator("figcaption")).to_have_count(2)
        with visitor.page.expect_download() as download:
            visitor.click("student-png")
        assert read_settings(download.value.path())["seed"] == 2
    finally:
        gate.set()
        hook.remove()
    assert same(visitor.sees("base")[1], base)
    assert visitor.shows("student", student)
    expect(visitor.part("base-caption")).to_contain_text("2 steps, 4 network evaluations (guidance), ")


def test_stop_while_the_base_model_draws(visit: Callable[..., Visitor], models: dict[str, Model]) -> None:
    """What is finished stays, and the next picture's progress is shown as ever."""
    gate, evaluations = Event(), []

    def held(*_: Any) -> None:
        evaluations.append(len(evaluations))
        gate.wait(60)

    visitor = visit().type(prompt="1", nfe="4").choose("Both")
    hook = models["digits"].networks["base"].register_forward_pre_hook(held)
    try:
        visitor.click()
        expect(visitor.part("base-image")).to_contain_text("Base model, step 1 of 4")
        with visitor.page.expect_response("**/run/predict"):
            visitor.click("stop")
        gate.set()
        expect(visitor.part("base-image")).not_to_contain_text("step 1 of 4")
        with models["digits"].lock:
            assert evaluations == [0, 1]  # of one step: with and without the class
    finally:
        gate.set()
        hook.remove()
    request = Request("1", width=96, total_substeps=64, temperature=1)
    assert visitor.shows("student", draw(models["digits"], "student", request).image)
    expect(visitor.part("base-image").locator("img")).to_have_count(0)
    with models["digits"].lock:  # the model is busy
        visitor.type(prompt="2").choose("Student").click()
        expect(visitor.part("student-image").get_by_test_id("status-tracker")).to_be_visible()
    visitor.sees()


def test_what_is_wrong_is_said_on_the_page(visit: Callable[..., Visitor]) -> None:
    visitor = visit().type(prompt="1").click()
    source, before = visitor.sees()
    for change, message in (
        ({"prompt": ""}, "There is nothing to draw: type digits, such as 31415."),
        ({"prompt": "cat"}, "This model draws the digits 0 to 9 and nothing else"),
        ({"prompt": "1", "width": "50"}, "Size: 50 is no multiple of 8; next to it are 48 and 56."),
        ({"width": "4096"}, "Size: expected a whole number from 8 to 256, got 4096."),
        ({"width": ""}, "Size is empty"),
        ({"width": "95.6"}, "Size: expected a whole number from 8 to 256, got 95.6."),
        ({"width": "96", "seed": "-3"}, "Seed: expected a whole number from 0"),
        ({"seed": "4294967296"}, "from 0 to 4294967295, got 4294967296."),
    ):
        visitor.type(**change).click().is_told(message)
        now, image = visitor.sees()
        assert now == source
        assert same(image, before)
    visitor.type(seed="4").click().sees(other_than=source)


def test_text_to_image(visit: Callable[..., Visitor], models: dict[str, Model]) -> None:
    for name in ("qwen_image", "flux"):
        visitor = visit(name).type(prompt="a <b>cat</b>", width="64", height="48", seed="3").choose("Both").click()
        seen = {network: visitor.sees(network)[1] for network in ("student", "base")}
        for network, image in seen.items():
            request = Request("a <b>cat</b>", seed=3, width=64, height=48)
            assert same(image, draw(models[name], network, request).image)
        assert not same(*seen.values())
        visitor.type(prompt="  ").click().is_told("The prompt is empty: say what the picture should show.")
        visitor.type(prompt="a cat", width="50").click().is_told("Width: 50 is no multiple of 4")


def test_editing(visit: Callable[..., Visitor], models: dict[str, Model], tmp_path: Path) -> None:
    reference = picture((64, 80))
    reference.save(tmp_path / "reference.png")
    visitor = visit("flux2").type(prompt="at night", width="32", height="32")
    visitor.part("references").locator("input[type=file]").set_input_files(tmp_path / "reference.png")
    visitor.part("references").locator("img").first.wait_for()
    _, seen = visitor.click().sees()
    request = Request("at night", width=32, height=32, references=[reference])
    assert same(seen, draw(models["flux2"], "student", request).image)
    assert (
        visit("qwen_image").part("references").count() == 0
        or not visitor.page.locator("#qwen_image-references").is_visible()
    )


def test_more_controls(visit: Callable[..., Visitor], models: dict[str, Model]) -> None:
    visitor = visit().type(prompt="8")
    visitor.part("more").get_by_role("button").first.click()
    visitor.part("automatic").locator("input").uncheck()
    visitor.type(substeps="16", temperature="0.1")
    visitor.part("trajectory").locator("input").uncheck()
    _, seen = visitor.choose("Student").click().sees()
    request = Request("8", width=96, total_substeps=16, temperature=0.1)
    assert same(seen, draw(models["digits"], "student", request).image)
    expect(visitor.part("student-steps")).to_be_hidden()
    visitor.click("dice")
    expect(visitor.part("seed").locator("input")).not_to_have_value("0")


def test_two_people_at_once(visit: Callable[..., Visitor], models: dict[str, Model]) -> None:
    """While one picture is being made the other waits in the queue, and everybody gets their own."""
    first, second = visit("flux"), visit("flux")
    with models["flux"].lock:  # the model is busy
        first.type(prompt="a cat", seed="1", width="16", height="16").choose("Student").click()
        expect(first.part("student-image")).to_contain_text("processing")
        second.type(prompt="a dog", seed="2", width="16", height="16").choose("Base").click()
        expect(second.part("base-image").or_(second.part("student-image")).first).to_contain_text("queue: 1/")
    for visitor, network, prompt, seed in ((first, "student", "a cat", 1), (second, "base", "a dog", 2)):
        _, seen = visitor.sees(network)
        request = Request(prompt, seed=seed, width=16, height=16)
        assert same(seen, draw(models["flux"], network, request).image)


def test_a_file_that_is_no_picture(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_text("no picture")
    visitor = visit("flux2").type(prompt="at night", width="32", height="32")
    visitor.part("references").locator("input[type=file]").set_input_files(tmp_path / "holiday.png")
    visitor.part("references").locator("img").first.wait_for(state="attached")
    visitor.click().is_told("holiday.png cannot be read as a picture: take a whole PNG, JPEG or WebP file.")


def test_what_nobody_foresaw_is_said_too(
    visit: Callable[..., Visitor], models: dict[str, Model], caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("the network fell over")

    hook = models["digits"].networks["student"].register_forward_pre_hook(fails)
    try:
        visitor = visit().type(prompt="1").click()
        visitor.is_told("Something went wrong on the server. Its log says what.")
    finally:
        hook.remove()
    assert "the network fell over" in caplog.text
    visitor.click().sees()


def test_progress_and_stop(visit: Callable[..., Visitor], models: dict[str, Model]) -> None:
    """The page counts the steps; Stop ends after the one under way, and what follows is as ever."""
    gate, evaluations = Event(), []

    def at_the_second_step(*_: Any) -> None:
        evaluations.append(len(evaluations))
        if len(evaluations) == 2:
            gate.wait(60)

    visitor = visit()
    hook = models["digits"].networks["student"].register_forward_pre_hook(at_the_second_step)
    try:
        visitor.type(prompt="1").choose("Student").click()
        expect(visitor.part("student-image")).to_contain_text("Student, step 2 of 4")
        with visitor.page.expect_response("**/run/predict"):  # the server has heard it
            visitor.click("stop")
        expect(visitor.part("student-image")).not_to_contain_text("step 2 of 4")
        gate.set()
        with models["digits"].lock:  # the picture is given up
            assert evaluations == [0, 1]
    finally:
        gate.set()
        hook.remove()
    visitor.type(prompt="2").click()
    _, seen = visitor.sees()
    assert same(seen, draw(models["digits"], "student", Request("2", width=96, total_substeps=64, temperature=1)).image)


def test_on_a_phone(visit: Callable[..., Visitor]) -> None:
    visitor = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    expect(visitor.part("student-image")).not_to_be_in_viewport()
    visitor.type(prompt="12345").click().sees()
    expect(visitor.part("student-image").locator("img")).to_be_in_viewport(ratio=1)
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    box = visitor.part("student-image").locator("img").bounding_box()
    assert box["x"] >= 0
    assert box["width"] >= 300


def test_the_server_talks_to_nobody(visit: Callable[..., Visitor], addresses: list[Any]) -> None:
    visit().type(prompt="3").click().sees()
    assert addresses == []


def test_the_server_ends_in_the_middle_of_a_picture(
    browser: Browser, models: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for one step and not for the picture, and takes along the files of those before."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    demo = web.build({"digits": models["digits"]})
    visitor = Visitor(browser, web.launch(demo))
    visitor.type(prompt="1").click().sees()
    assert list(tmp_path.rglob("*.png"))
    gate, begun, evaluations = Event(), Event(), []

    def at_each_step(*_: Any) -> None:
        evaluations.append(len(evaluations))
        begun.set()
        gate.wait(60)

    hook = models["digits"].networks["student"].register_forward_pre_hook(at_each_step)
    try:
        visitor.type(prompt="2").click()
        assert begun.wait(60)
        web.close(demo)
        gate.set()
        with models["digits"].lock:
            assert evaluations == [0]
        demo.server.thread.join(60)
        assert list(tmp_path.rglob("*.png")) == []
    finally:
        gate.set()
        hook.remove()
        visitor.context.close()


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["app", "--no-browser", "--port", str(port)])
    assert done.exit_code == 1
    assert f"Nothing can listen at 127.0.0.1, port {port}: Address already in use. Give another --port." in done.output


def heeds_interrupts() -> None:
    """In a new process: one started by a shell's background job would ignore SIGINT, as its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("options", "opened"), [([], True), (["--no-browser"], False), (["--json"], False), (["--json", "--browser"], True)]
)
def test_the_command(options: list[str], opened: bool, tmp_path: Path) -> None:
    """`piflow app` says where the page is, opens it, serves it, and ends with Ctrl-C."""
    (tmp_path / "browser").write_text(f"#!/bin/sh\necho $1 > {tmp_path / 'opened'}\n")
    (tmp_path / "browser").chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-m", "piflow.cli", "app", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "BROWSER": str(tmp_path / "browser")},
        preexec_fn=heeds_interrupts,
    )  # fmt: skip
    try:
        said = process.stdout.readline()
        if "--json" in options:
            found = json.loads(said)
            digits = {"title": "Digits", "base": "digits-teacher", "adapter": "student-nfe4", "nfe": 4}
            assert found == {"url": found["url"], "models": {"digits": digits}}
            address = found["url"]
        else:
            address = re.fullmatch(r"The web demo is at (\S+) \(Ctrl-C ends it\)\n", said)[1]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        assert b"pi-Flow" in urllib.request.urlopen(address).read()
        process.send_signal(signal.SIGINT)
        rest, complaints = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, rest) == (130, "")
    assert "Traceback" not in complaints
    assert (tmp_path / "opened").exists() == opened


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--student", "{}"], "No digits student in {}: config.json"),
        (["--flux", "{}", "{}"], "model_index.json"),
        (["--offload", "--device", "cpu"], "--offload needs a GPU to offload from."),
        (["--device", "toaster"], "--device toaster cannot be used"),
    ],
)
def test_the_command_says_what_is_wrong(words: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["app", "--no-browser", *(word.format(tmp_path) for word in words)])
    assert done.exit_code in (1, 2)
    assert message.format(tmp_path) in done.output
    assert done.output.startswith("piflow: ")
