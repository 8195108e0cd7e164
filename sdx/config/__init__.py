"""One typed configuration: schema, composition, checks, errors and identity. No JAX here."""
