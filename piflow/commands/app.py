"""`piflow app`: the web demo."""

from __future__ import annotations

import json
import signal
import socket
import sys
from contextlib import redirect_stdout
from pathlib import Path
from threading import Event
from typing import Annotated

import typer

from piflow.commands.common import Device, progress, quiet_libraries, told, usable_device
from piflow.commands.sample import DType

Pair = tuple[str, str]


def app(
    qwen_image: Annotated[Pair | None, typer.Option(metavar="BASE ADAPTER", help="Also pi-Qwen-Image.")] = None,
    flux: Annotated[Pair | None, typer.Option(metavar="BASE ADAPTER", help="Also pi-FLUX.1.")] = None,
    flux2: Annotated[Pair | None, typer.Option(metavar="BASE ADAPTER", help="Also pi-FLUX.2, with editing.")] = None,
    student: Annotated[
        Path | None, typer.Option(help="Folder of another digits student than the one that is shipped.")
    ] = None,
    device: Device = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Of the text-to-image models. By default bfloat16 on a GPU, float32 elsewhere.")
    ] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep on the GPU only the part of a model that is computing.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 opens the demo to the network.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="By default the first free one from 7860 on.")
    ] = None,
    browser: Annotated[
        bool | None,
        typer.Option("--browser/--no-browser", help="Open the page in a browser. By default yes, with --json no."),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="How many people may wait for a picture.")] = 64,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print address and models as one line of JSON, once the page is served.")
    ] = False,
) -> None:
    """Open the web demo: handwritten digits on any machine, and the text-to-image models that are named.

    BASE and ADAPTER are folders or Hugging Face repositories, the adapter's with its subfolder behind it. The server
    talks to nobody but those who open its page. Ctrl-C ends it.
    """
    with told():
        check_address(host, port)
        log = sys.stderr if as_json else sys.stdout
        with redirect_stdout(log), progress() as bars, quiet_libraries():
            task = bars.add_task("loading", total=None)
            import torch

            from piflow.apps.web import models, page

            device = usable_device(device)
            if offload and device == "cpu":
                raise ValueError("--offload needs a GPU to offload from.")
            precision = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
            shown: dict[str, models.Model] = {"digits": models.load_digits(student)}
            for family, places in {"qwen_image": qwen_image, "flux": flux, "flux2": flux2}.items():
                if places is None:
                    continue
                bars.update(task, description=f"loading {places[0]} and {places[1]}")
                shown[family] = models.load_text_model(family, *places, device=device, dtype=precision, offload=offload)
        demo = page.build(shown, max_queue)
        address = page.launch(demo, host=host, port=port, browser=not as_json if browser is None else browser)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which clears up, too
        served = {"url": address, "models": {name: model.facts() for name, model in shown.items()}}
        print(json.dumps(served) if as_json else f"The web demo is at {address} (Ctrl-C ends it)", flush=True)
        try:
            Event().wait()
        finally:
            page.close(demo)


def check_address(host: str, port: int | None) -> None:
    """Raises ValueError that says why nothing can listen there, which is better known before models are loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port or 0), family=family).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (while ")[0]
        place, option = (host, "--host") if port is None else (f"{host}, port {port}", "--port")
        raise ValueError(f"Nothing can listen at {place}: {reason}. Give another {option}.") from error
