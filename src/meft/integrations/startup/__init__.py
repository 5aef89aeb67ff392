"""The folder that `meft run` puts on the path of modules of the programs it starts."""
