"""The `ccnet` command: one module a subcommand."""
