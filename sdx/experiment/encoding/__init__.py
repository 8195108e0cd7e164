"""What `sdx.encode` does: a cache, shard by shard."""
