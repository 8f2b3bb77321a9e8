"""Learning over time on endless streams of traces."""
