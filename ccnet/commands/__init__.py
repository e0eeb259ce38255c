"""One module per subcommand of `ccnet`: `register(subparsers)` and `run(arguments, overrides)`."""
