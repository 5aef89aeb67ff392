"""Prints the path of the plug-in, for `--external_plugins`.

ms-swift puts the plug-in's folder on the path of modules, so it stands in a folder of its own.
"""

from pathlib import Path

print(Path(__file__).parent / "plugin" / "meft_plugin.py")
