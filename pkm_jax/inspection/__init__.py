"""A look inside memories: which slots are read for which words, and what they hold."""
