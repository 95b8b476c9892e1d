"""`dist-train convert`: checkpoints of ours to and from the formats that others hold."""
