"""The notebooks are run from their .ipynb; their text pairs are for reading."""

collect_ignore_glob = ["*.py"]
