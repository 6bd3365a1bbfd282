"""The command line: `ncsr-fast demo | sample | train | evaluate | doctor`, one subcommand a file."""
