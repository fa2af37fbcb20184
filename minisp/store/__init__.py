"""Bytes at rest: checkpoints, records of a run, shards; durable, locked, checksummed."""
