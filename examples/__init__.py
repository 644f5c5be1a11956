"""Programs to start from; each takes `--quick` and is run by a test."""
