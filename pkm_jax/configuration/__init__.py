"""From a configuration file and the command line to the one typed `Run` that everything reads."""
