"""The errors a user of miniclip can meet. Each message is one sentence with the numbers in it.

Every class is also the builtin that the same mistake raises in plain Python (or raised in openai/CLIP), so existing
``except`` clauses keep working.
"""


class MiniclipError(Exception):
    """Base class of everything miniclip raises on purpose."""


class ConfigError(MiniclipError, ValueError):
    """A configuration file, or an argument standing in for one, that does not describe a CLIP miniclip can run."""


class CheckpointError(MiniclipError, ValueError):
    """A weights file that is damaged, of the wrong kind, or does not fit its configuration."""


class UnknownModelError(MiniclipError, RuntimeError):
    """A name that is neither a path, a known model nor a repository that can be read (RuntimeError in openai/CLIP)."""


class DownloadError(MiniclipError, OSError):
    """Weights that could not be fetched, or that arrived with the wrong checksum."""


class StorageError(MiniclipError, OSError):
    """A folder or file that cannot be written."""


class InputError(MiniclipError, ValueError):
    """A tensor of the wrong shape, dtype, device or content."""


class TextTooLongError(MiniclipError, ValueError, RuntimeError):
    """A text with more tokens than the context holds. RuntimeError is what clients of openai/CLIP catch."""


class ImageError(MiniclipError, OSError):
    """An image file that cannot be read. ``path`` names it."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[object, str]]:
        return type(self), (self.path, self.reason)  # OSError's own pickling would pass the message as the path
