"""The report of one experiment: tables, plots, one HTML page; every figure is read from the stages' files."""
