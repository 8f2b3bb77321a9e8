"""Reports of runs: tables, plots, HTML, verdicts, progress."""
