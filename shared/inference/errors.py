"""What can go wrong between a file and its mask, as classes with a stable code.

The service maps the codes to its answers; `str(error)` is one clear sentence for the person who sent the file or
runs the worker. Nothing here needs torch, so the API reads the codes too. The names say what is wrong, so they do
without "Error".
"""

from typing import ClassVar


class InferenceError(Exception):
    """Base of every failure of the inference core; the message is the detail shown to people."""

    code: ClassVar[str] = "inference_failed"
    retryable: ClassVar[bool] = True


class InvalidMedia(InferenceError):
    """The bytes are no image or recording that Maskline reads, or a damaged one."""

    code = "invalid_media"
    retryable = False


class MediaLimit(InferenceError):
    """A sound image or recording beyond a limit of this installation."""

    code = "media_limit"
    retryable = False


class ModelUnavailable(InferenceError):
    """The weights of a mode cannot be had or read; trying again does not help until somebody provides them."""

    code = "model_unavailable"
    retryable = False


class OutOfMemory(InferenceError):
    """The device has too little memory for this image at this input size."""

    code = "out_of_memory"
    retryable = False
