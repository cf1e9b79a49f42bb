"""A program of its own: fork server, pause and monitors; it imports only the standard library and itself."""
