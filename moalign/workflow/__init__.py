"""One module per verb of the command line: plan and do the work; the command line parses and prints."""
