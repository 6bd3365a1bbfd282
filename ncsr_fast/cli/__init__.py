"""The command line: `ncsr-fast COMMAND`, one subcommand a file; `ncsr_fast.cli.main.COMMANDS` lists them."""
