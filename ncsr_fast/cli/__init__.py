"""The command line: `ncsr-fast demo | sample | train | plot | evaluate | bench | doctor`, one subcommand a file."""
