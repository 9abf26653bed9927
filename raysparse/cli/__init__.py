"""The commands. Results go to stdout, progress to stderr; torch and ray are imported inside the commands.

One file per group of commands, in the order that `raysparse --help` shows.
"""

import importlib

from raysparse.cli.app import app, command_line, load_sweep, load_trial, main, parse_changes

__all__ = ["app", "command_line", "load_sweep", "load_trial", "main", "parse_changes"]

GROUPS = ("prepare", "train", "plan", "sweep", "models", "cost", "cluster", "watch", "trials", "storage")
for _group in GROUPS:
    importlib.import_module(f"raysparse.cli.{_group}")  # adds its commands to the application
