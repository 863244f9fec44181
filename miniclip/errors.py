"""The errors that miniclip raises on purpose. Each message is one sentence and holds the numbers that matter.

Every class also inherits from the builtin error that plain Python (or openai/CLIP) raises for the same mistake.
Existing ``except`` clauses therefore keep working.
"""


class MiniclipError(Exception):
    """Base class of all errors below."""


class ConfigError(MiniclipError, ValueError):
    """A configuration file, or an argument that replaces one, does not describe a CLIP that miniclip can run."""


class CheckpointError(MiniclipError, ValueError):
    """A weights file is damaged, of the wrong kind, or does not fit its configuration."""


class UnknownModelError(MiniclipError, RuntimeError):
    """A name is not a path, not a known model and not a readable repository (openai/CLIP: RuntimeError)."""


class DownloadError(MiniclipError, OSError):
    """Weights could not be downloaded, or they arrived with the wrong checksum."""


class StorageError(MiniclipError, OSError):
    """A folder of vectors, or a file in it, cannot be written, read, removed or memory-mapped."""


class InputError(MiniclipError, ValueError):
    """An argument has the wrong shape, dtype, device or content."""


class TextTooLongError(MiniclipError, ValueError, RuntimeError):
    """A text has more tokens than the context holds (openai/CLIP: RuntimeError)."""


class ImageError(MiniclipError, OSError):
    """An image file cannot be read.

    Attributes:
        path: the file, as the caller named it.
        reason: why the file cannot be read, without the path.
    """

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[object, str]]:
        # Without this method, OSError's own pickling would pass the whole message as the path.
        return type(self), (self.path, self.reason)
