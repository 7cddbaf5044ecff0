"""The project's own package; each floor imports only floors below it (wire, core, settings, ... service)."""
