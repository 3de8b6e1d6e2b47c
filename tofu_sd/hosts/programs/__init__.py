"""What ComfyUI and the web UIs share: options on the screen, and patches of a cloned model."""
