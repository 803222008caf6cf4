"""pi-Flow's nodes for ComfyUI: put or link this folder into ComfyUI/custom_nodes. README.md says how."""

try:
    from piflow.apps.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, register_folders
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"pi-Flow's nodes need the package {missing.name}. Install piflow into the Python that runs ComfyUI: "
        "python -m pip install '<folder of piflow>[diffusers]'",
        name=missing.name,
    ) from missing

register_folders()

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
