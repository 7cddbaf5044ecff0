"""What a process says about itself: log lines (log.py) and numbers (metrics.py). Bodies and secrets are in neither."""
