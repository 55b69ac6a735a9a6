"""The cache: its config and exact bytes, the pytree, and the verbs that make and change it."""
