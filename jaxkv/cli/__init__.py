"""The subcommands of ``jaxkv``: a file each, with a row in `jaxkv.cli.COMMANDS`."""
