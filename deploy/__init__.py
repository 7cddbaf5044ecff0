"""How it is run: the `hotpath` command, the simulator, configuration files, decisions."""
