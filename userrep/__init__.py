"""General-purpose user representations: the library (no command line, no cluster knowledge)."""
