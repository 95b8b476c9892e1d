"""Where it runs: what this machine can reach of a Slurm cluster."""
