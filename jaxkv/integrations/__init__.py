"""jaxkv inside models that exist already: a module a library, imported only when asked for."""
