"""What you do before and after a training run."""
