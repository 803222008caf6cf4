"""The web demo: `models` loads what it shows, `generation` makes the pictures, `page` is what people see (Gradio)."""
