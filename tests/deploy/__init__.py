"""The command line, the supervisor and the files they write."""
