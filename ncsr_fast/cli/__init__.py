"""The command line: `ncsr-fast demo | sample | train | evaluate | bench | doctor`, one subcommand a file."""
