"""What people make pictures with: PNG files that carry their settings, the web demo, and ComfyUI's nodes."""
