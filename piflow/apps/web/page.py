"""The page: a tab for each model, controls on the left, the pictures of student and base model on the right.

It fetches nothing from anywhere but its own server, which reports nothing to anyone.
"""

from __future__ import annotations

import html
import logging
import random
from collections.abc import Callable, Iterator
from threading import Event
from typing import Any, Literal

import gradio as gr
import torch

from piflow.apps.sizes import LONGEST_SIDE

from . import panel
from .generation import LARGEST_SEED, Request, Stopped, draw, reference
from .models import DigitsModel, Flux2Model, Model, Network, TextModel
from .panel import TITLES, Panel, arranged

CHOICES: dict[str, tuple[Network, ...]] = {"Student": ("student",), "Base": ("base",), "Both": ("student", "base")}
HOUR = 3600

BEGIN = """() => {
    const results = document.getElementById("%s");
    if (results.getBoundingClientRect().top > innerHeight / 2) results.scrollIntoView({behavior: "smooth"});
    const nothingFinished = {__type__: "update", elem_classes: []};
    return [nothingFinished, nothingFinished];
}"""
"""On a narrow screen the pictures, and how far they are, lie below the controls. No column is `finished`, as one stays
that was stopped while the other was being drawn.
"""

INTRODUCTION = """# pi-Flow
In each step the student's network is evaluated once. What it returns is a *policy*, a formula for the velocity at \
every later noise level, and substeps follow it. Compare it with its base model: as many steps, from the same noise."""

CSS = f"""
.gradio-container {{ max-width: min(1240px, 100vw) !important; margin: 0 auto !important; min-width: 0 !important; }}
@media (max-width: 480px) {{ .gradio-container .main {{ padding: 16px !important; }} }}
{panel.CSS}"""


def build(models: dict[str, Model], max_queue: int = 64) -> gr.Blocks:
    """The page for these models, {name: model}.

    One text-to-image picture is made at a time, and one of digits; others wait in a queue that shows their place in it.
    """
    running: dict[str, dict[str, Event]] = {name: {} for name in models}
    with gr.Blocks(title="pi-Flow", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Tabs():
            for name, model in models.items():
                with gr.Tab(model.title, id=name):
                    _tab(page, name, model, running[name])
        page.unload(_stopper(*running.values()))
    return page.queue(max_size=max_queue)


def launch(page: gr.Blocks, *, host: str = "127.0.0.1", port: int | None = None, browser: bool = False) -> str:
    """Serve the page from a thread; returns its address. Raises OSError if the port is taken."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # which the visitor's system has
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "Consolas", "monospace"])
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        theme=theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"),
        head=f"<style>{CSS}</style>",  # as `css`, Gradio confines it to what lies within the page's margins
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        max_file_size="32mb",
    )
    return address


def close(page: gr.Blocks) -> None:
    """End the server: pictures after the step under way, and their files; it does not wait for open pages to go."""
    assert page.server is not None
    logging.getLogger("uvicorn.error").disabled = True  # which would show a traceback for each page that is open
    page.server.config.timeout_graceful_shutdown = 1
    page.close(verbose=False)


def _tab(page: gr.Blocks, name: str, model: Model, running: dict[str, Event]) -> None:
    digits = isinstance(model, DigitsModel)
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            controls = _controls(name, model)
        with gr.Column(scale=5, min_width=320, elem_id=f"{name}-results"), gr.Row():
            panels = [Panel.lay_out(name, network, digits=digits) for network in TITLES]
    start, stop = controls.pop("start"), controls.pop("stop")
    asked = [start.click, controls["prompt"].submit]
    columns = [panel.column for panel in panels]
    gr.on(asked, None, None, columns, js=BEGIN % f"{name}-results", queue=False, api_visibility="private")
    drawing = gr.on(
        asked,
        _drawer(page, model, panels, running),
        list(controls.values()),
        [output for panel in panels for output in panel.outputs],
        concurrency_id="digits" if digits else "text",
        concurrency_limit=1,
        api_name=f"draw_{name}",
        show_progress_on=[panel.image for panel in panels],
    )
    stop.click(_stopper(running), queue=False, cancels=drawing, api_visibility="private")


def _controls(name: str, model: Model) -> dict[str, Any]:
    """The controls in the order of `_drawer`'s arguments, and the buttons `start` and `stop`."""
    digits = isinstance(model, DigitsModel)

    def named(control: str) -> dict[str, Any]:
        return {"elem_id": f"{name}-{control}"}

    prompt = gr.Textbox(
        "31415" if digits else "",
        label="Digits" if digits else "Prompt",
        info="Each is drawn in somebody's handwriting." if digits else None,
        placeholder="31415" if digits else "A bookshop window at dusk, rain on the glass",
        lines=1 if digits else 3,
        **named("prompt"),
    )
    references = gr.Gallery(
        label="Pictures to change (optional)",
        type="filepath",
        file_types=["image"],
        columns=3,
        height=150,
        visible=isinstance(model, Flux2Model),
        **named("references"),
    )
    with gr.Row():
        start = gr.Button("Draw", variant="primary", min_width=80, scale=2, **named("draw"))
        stop = gr.Button("Stop", min_width=80, **named("stop"))
    shown = gr.Radio(list(CHOICES), value="Both" if digits else "Student", label="Draw with", **named("shown"))
    nfe = gr.Slider(
        1,
        16,
        value=model.nfe,
        step=1,
        label="Steps",
        info=f"The student was trained for {model.nfe}. Fewer cost quality.",
        **named("nfe"),
    )
    with gr.Row():
        width = gr.Number(
            96 if digits else 1024,
            label="Size" if digits else "Width",
            info=f"Multiple of {model.multiple if isinstance(model, TextModel) else 8}.",
            min_width=90,
            **named("width"),
        )
        height = gr.Number(
            1024,
            label="Height",
            info=f"Up to {LONGEST_SIDE}.",
            min_width=90,
            visible=not digits,
            **named("height"),
        )
        seed = gr.Number(0, label="Seed", info="Of the noise.", min_width=90, **named("seed"))
    dice = gr.Button("New seed", size="sm", **named("dice"))
    with gr.Accordion("More", open=False, **named("more")):
        total_substeps = gr.Slider(
            8,
            512,
            value=model.total_substeps,
            step=1,
            label="Substeps",
            info="Of the student's policies, in all steps together. They need no network.",
            **named("substeps"),
        )
        automatic = gr.Checkbox(
            model.automatic_temperature,
            label="Automatic temperature",
            info="0.1 times (steps - 1), at most 1.",
            visible=model.has_temperature,
            **named("automatic"),
        )
        temperature = gr.Slider(
            0,
            1,
            value=0.3 if model.automatic_temperature else 1,
            step=0.05,
            label="Temperature",
            info="Below 1 it sharpens the student's policy.",
            visible=model.has_temperature and not model.automatic_temperature,
            **named("temperature"),
        )
        trajectory = gr.Checkbox(True, label="Show what each step was heading for", **named("trajectory"))
    private: dict[str, Any] = {"queue": False, "api_visibility": "private"}
    automatic.change(lambda on: gr.update(visible=not on), automatic, temperature, **private)
    dice.click(lambda: random.randint(0, LARGEST_SEED), None, seed, **private)
    return {
        "start": start, "stop": stop, "prompt": prompt, "references": references, "shown": shown, "nfe": nfe,
        "width": width, "height": height, "seed": seed, "total_substeps": total_substeps, "automatic": automatic,
        "temperature": temperature, "trajectory": trajectory,
    }  # fmt: skip


def _drawer(
    page: gr.Blocks, model: Model, panels: list[Panel], running: dict[str, Event]
) -> Callable[..., Iterator[list[Any]]]:
    def drawing(
        prompt: str | None,
        references: list[Any] | None,
        shown: str,
        nfe: float | None,
        width: float | None,
        height: float | None,
        seed: float | None,
        total_substeps: float | None,
        automatic: bool,
        temperature: float,
        trajectory: bool,
        session: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio looks for it here
    ) -> Iterator[list[Any]]:
        """Each picture is shown as soon as it is there; the last value is all of them."""
        sharpened: float | Literal["auto"] = "auto" if automatic else temperature
        stopped = running[str(session.session_hash)] = Event()
        finished: dict[Network, list[Any]] = {}
        try:
            pictures = [reference(path) for path, _ in references or ()]
            request = Request(prompt or "", seed, width, height, nfe, total_substeps, sharpened, pictures, trajectory)
            chosen = [panel for panel in panels if panel.network in CHOICES[shown]]
            for number, panel in enumerate(chosen, start=1):

                def on_step(done: int, steps: int, title: str = TITLES[panel.network]) -> None:
                    if stopped.is_set() or not page.is_running:
                        raise Stopped
                    progress((done, steps), desc=f"{title}, step {min(done + 1, steps)} of {steps}", unit="steps")

                finished[panel.network] = panel.contents(draw(model, panel.network, request, on_step))
                if awaited := [later.network for later in chosen[number:]]:
                    yield arranged(panels, finished, awaited)
        except Stopped:
            pass  # nobody waits for what comes back
        except ValueError as error:
            gr.Warning(html.escape(str(error)))
        except torch.OutOfMemoryError:
            gr.Warning("There is not enough GPU memory for this size: try a smaller one.")
        except Exception:  # Gradio would put "Error" in the pictures' places, and nothing else
            logging.getLogger(__name__).exception("a picture could not be drawn")
            gr.Warning("Something went wrong on the server. Its log says what.")
        finally:
            running.pop(str(session.session_hash), None)
        yield arranged(panels, finished) if finished else [gr.skip() for panel in panels for _ in panel.outputs]

    return drawing


def _stopper(*running: dict[str, Event]) -> Callable[[gr.Request], None]:
    def stop(session: gr.Request) -> None:
        for events in running:
            if (event := events.get(str(session.session_hash))) is not None:
                event.set()

    return stop
