"""The `demo` mode's own world: drawn landscapes with exact masks, and the small model that was trained on them."""
