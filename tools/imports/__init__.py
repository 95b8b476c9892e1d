"""Reads the layouts in which corpora are published: `dist-train shards make --from KIND`."""
