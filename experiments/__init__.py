"""Tasks, reports, many runs, studies, speeds and trained agents: docs/index.md draws the house."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)  # a folder of this name where the user stands is searched, too
