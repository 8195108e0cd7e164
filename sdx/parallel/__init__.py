"""How devices share the work: the mesh, the sharding of arrays, stopping together."""
