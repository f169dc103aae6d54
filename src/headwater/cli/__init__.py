"""The command line: one file a command group. `headwater --help` loads neither torch nor a room of the library."""

from headwater.cli.app import app, main

__all__ = ["app", "main"]
