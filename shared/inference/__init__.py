"""The inference core: from an image to its mask. Imports nothing of the service, so it also runs alone."""
