"""Where one network's picture is shown: what it cost, its download, and a strip of what each step was heading for."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio import processing_utils
from PIL import Image

from piflow.apps.png import save_png

from .generation import Picture
from .models import Network

TITLES: dict[Network, str] = {"student": "Student", "base": "Base model"}
THUMBNAIL = 320

CSS = """
.steps { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 8px; }
.steps.wide { grid-template-columns: 1fr; }
.steps figure { margin: 0; }
.steps img { width: 100%; display: block; border-radius: 4px; }
.steps figcaption { font-size: 13px; color: var(--body-text-color); padding: 2px 0 4px; }
.pixelated img { image-rendering: pixelated; }
.finished [data-testid=status-tracker] { display: none; }
"""
"""`finished`: the picture is to be seen, and not how far the other one is."""


@dataclass(frozen=True)
class Panel:
    """The components of one network's column, for the model of that name."""

    name: str
    network: Network
    column: gr.Column
    image: gr.Image
    caption: gr.Markdown
    download: gr.DownloadButton
    steps: gr.HTML

    @classmethod
    def lay_out(cls, name: str, network: Network, *, digits: bool) -> Panel:
        """Make the components here; the base model's are hidden until somebody asks for it."""
        place, pixelated = f"{name}-{network}", ["pixelated"] if digits else []
        with gr.Column(min_width=280, visible=digits or network == "student") as column:
            gr.Markdown(f"### {TITLES[network]}")
            return cls(
                name,
                network,
                column,
                gr.Image(
                    show_label=False,
                    format="png",
                    buttons=["fullscreen"],
                    interactive=False,
                    height=180 if digits else 440,
                    elem_id=f"{place}-image",
                    elem_classes=pixelated,
                ),
                gr.Markdown(elem_id=f"{place}-caption"),
                gr.DownloadButton(
                    "Download PNG, with its settings", size="sm", interactive=False, elem_id=f"{place}-png"
                ),
                gr.HTML(visible=False, elem_id=f"{place}-steps", elem_classes=pixelated),
            )

    @property
    def outputs(self) -> list[Any]:
        """The components that `arranged` has values for: the column, and what `contents` and `empty` are values of."""
        return [self.column, self.image, self.caption, self.download, self.steps]

    def contents(self, picture: Picture) -> list[Any]:
        """What is in the column with this picture."""
        buffer = io.BytesIO()
        save_png(picture.image, buffer, picture.settings)
        title = f"piflow-{self.name}-{self.network}-{picture.settings['nfe']}-steps-seed-{picture.settings['seed']}.png"
        file = processing_utils.save_bytes_to_cache(buffer.getvalue(), title, self.image.GRADIO_CACHE)
        download = gr.update(value=file, interactive=True)
        steps = gr.update(value=strip(picture.steps), visible=bool(picture.steps))
        return [file, caption_of(picture), download, steps]

    def empty(self) -> list[Any]:
        """What is in the column without a picture."""
        return [None, "", gr.update(value=None, interactive=False), gr.update(value="", visible=False)]


def arranged(
    panels: Iterable[Panel], finished: Mapping[Network, list[Any]], awaited: Collection[Network] = ()
) -> list[Any]:
    """Values for the panels' `outputs`: what is `finished`, room for what is `awaited`, and nothing else."""
    values = []
    for panel in panels:
        contents = finished.get(panel.network)
        classes = ["finished"] if contents and awaited else []
        values.append(gr.update(visible=bool(contents) or panel.network in awaited, elem_classes=classes))
        values += contents or panel.empty()
    return values


def caption_of(picture: Picture) -> str:
    """What a picture cost, in one line."""
    steps, evaluations = picture.settings["nfe"], picture.evaluations
    counts = f"{steps} step{'s' * (steps > 1)}, {evaluations} network evaluation{'s' * (evaluations > 1)}"
    return f"{counts}{' (guidance)' * (evaluations > steps)}, {picture.seconds:.2f} s"


def strip(steps: list[tuple[float, Image.Image]]) -> str:
    """HTML of small pictures with the noise level after each step; empty without steps."""
    if not steps:
        return ""
    wide = steps[0][1].width > 2 * steps[0][1].height
    figures = "".join(
        f"<figure><img src='{_data_url(image)}' alt='After step {number}'>"
        f"<figcaption>Step {number}, to noise level {sigma:.2f}</figcaption></figure>"
        for number, (sigma, image) in enumerate(steps, 1)
    )
    return (
        "<p>What each step was heading for: its velocity, followed down to noise level 0.</p>"
        f"<div class='steps{' wide' * wide}'>{figures}</div>"
    )


def _data_url(image: Image.Image) -> str:
    small, buffer = image.copy(), io.BytesIO()
    if image.height > THUMBNAIL:
        small.thumbnail((2 * THUMBNAIL, THUMBNAIL))
    small.save(buffer, format="WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
